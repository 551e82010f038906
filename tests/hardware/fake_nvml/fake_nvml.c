/* A stand-in for libnvidia-ml.so.1, told by a text file what to answer. For tests only.
 *
 * Written from the public NVML interface as nvidia-ml-py declares it. Build:
 *
 *     cc -shared -fPIC -o libnvidia-ml.so.1 fake_nvml.c            a driver of today
 *     cc -shared -fPIC -DOLD_DRIVER -o libnvidia-ml.so.1 ...       one of 2020: without the calls that came later
 *
 * $EDGEFED_FAKE_NVML names the file. It is read again at every call, so a test can change the machine under a running
 * program. One "key = value" a line, '#' begins a comment, the last line of a key wins:
 *
 *     init = !9                 nvmlInit fails with NVML's error 9
 *     count = 2
 *     0.Name = NVIDIA H200      what nvmlDeviceGetName says of GPU 0; without the line: not supported (3)
 *     0.UUID = !4               ... fails with error 4 (no permission)
 *     0.lost = 1                every call on GPU 0 fails with 15; 0.handle = !4: it cannot even be opened
 *     0/2.Name = ...            the same of its MIG instance 2; an instance without a Name does not exist (6)
 *     0.Memory = TOTAL RESERVED USED        in bytes
 *     0.Compute = PID:BYTES PID:BYTES       0.Graphics likewise; BYTES of -1: the driver does not say
 *     process.PID = /usr/bin/python3
 *     generation = 2            any other number than before: handles given out until then are invalid (2)
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef unsigned int u32;
typedef unsigned long long u64;
typedef struct card { int gpu, mig; long generation; } *Card;
enum { OK = 0, UNINITIALIZED = 1, INVALID = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, TOO_SMALL = 7, LOST = 15, VERSION = 25 };
#define MOST 64

static int started;
static struct card cards[4096]; /* handles that were given out; the oldest are used again */
static unsigned given;

/* The value of a key in a buffer of the caller; 0 when there is none. */
static int lookup(const char *key, char *value, size_t size) {
    const char *path = getenv("EDGEFED_FAKE_NVML");
    FILE *file = path ? fopen(path, "r") : NULL;
    char line[2048];
    int found = 0;
    if (!file) return 0;
    while (fgets(line, sizeof line, file)) {
        line[strcspn(line, "#\n")] = 0;
        char *equals = strchr(line, '=');
        if (!equals) continue;
        char *end = equals;
        while (end > line && end[-1] == ' ') end--;
        *end = 0;
        if (strcmp(line, key)) continue;
        char *start = equals + 1 + strspn(equals + 1, " ");
        for (size_t n = strlen(start); n && start[n - 1] == ' '; n--) start[n - 1] = 0;
        snprintf(value, size, "%s", start);
        found = 1;
    }
    fclose(file);
    return found;
}

static long generation(void) {
    char value[32];
    return lookup("generation", value, sizeof value) ? atol(value) : 0;
}

static int hand_out(int gpu, int mig, Card *out) {
    Card card = &cards[given++ % 4096];
    *card = (struct card){gpu, mig, generation()};
    *out = card;
    return OK;
}

static int global(const char *key, char *value, size_t size) {
    if (!started) return UNINITIALIZED;
    if (!lookup(key, value, size)) return NOT_SUPPORTED;
    return value[0] == '!' ? atoi(value + 1) : OK;
}

static int ask(Card card, const char *what, char *value, size_t size) {
    char key[96], word[32];
    if (!started) return UNINITIALIZED;
    if (!card || card->generation != generation()) return INVALID;
    snprintf(key, sizeof key, "%d.lost", card->gpu);
    if (lookup(key, word, sizeof word) && atoi(word)) return LOST;
    if (card->mig < 0) snprintf(key, sizeof key, "%d.%s", card->gpu, what);
    else snprintf(key, sizeof key, "%d/%d.%s", card->gpu, card->mig, what);
    return global(key, value, size);
}

static int number(Card card, const char *what, u64 *out) {
    char value[64];
    int code = ask(card, what, value, sizeof value);
    if (!code) *out = strtoull(value, NULL, 0);
    return code;
}

static int small(Card card, const char *what, u32 *out) {
    u64 wide = 0;
    int code = number(card, what, &wide);
    if (!code) *out = (u32)wide;
    return code;
}

static int text(Card card, const char *what, char *out, u32 size) {
    char value[1024];
    int code = ask(card, what, value, sizeof value);
    if (code) return code;
    if (strlen(value) >= size) return TOO_SMALL;
    strcpy(out, value);
    return OK;
}

static int plain(const char *key, char *out, u32 size) {
    char value[1024];
    int code = global(key, value, sizeof value);
    if (!code) snprintf(out, size, "%s", value);
    return code;
}

#define NUMBER(function, what) int function(Card card, u32 *out) { return small(card, what, out); }
#define WIDE(function, what) int function(Card card, u64 *out) { return number(card, what, out); }
#define PAIR(function, what) int function(Card card, u32 *now, u32 *then) { \
    int code = small(card, what, now); if (!code) *then = *now; return code; }

int nvmlInitWithFlags(u32 flags) {
    char value[32];
    (void)flags;
    if (lookup("init", value, sizeof value) && value[0] == '!') return atoi(value + 1);
    started++;
    return OK;
}
int nvmlShutdown(void) { if (!started) return UNINITIALIZED; started--; return OK; }
int nvmlSystemGetDriverVersion(char *out, u32 size) { return plain("driver", out, size); }
int nvmlSystemGetNVMLVersion(char *out, u32 size) { return plain("nvml", out, size); }
int nvmlSystemGetCudaDriverVersion_v2(int *out) {
    char value[32];
    int code = plain("cuda", value, sizeof value);
    if (!code) *out = atoi(value);
    return code;
}
int nvmlSystemGetCudaDriverVersion(int *out) { return nvmlSystemGetCudaDriverVersion_v2(out); }
int nvmlSystemGetProcessName(u32 pid, char *out, u32 size) {
    char key[32];
    snprintf(key, sizeof key, "process.%u", pid);
    int code = plain(key, out, size);
    return code == NOT_SUPPORTED ? NOT_FOUND : code;
}
int nvmlDeviceGetCount_v2(u32 *out) {
    char value[32];
    int code = plain("count", value, sizeof value);
    if (!code) *out = (u32)strtoul(value, NULL, 0);
    return code;
}
int nvmlDeviceGetHandleByIndex_v2(u32 index, Card *out) {
    char key[32], value[32];
    u32 count = 0;
    int code = nvmlDeviceGetCount_v2(&count);
    if (code) return code;
    if (index >= count || index >= MOST) return INVALID;
    snprintf(key, sizeof key, "%u.handle", index);
    if (lookup(key, value, sizeof value) && value[0] == '!') return atoi(value + 1);
    return hand_out((int)index, -1, out);
}
int nvmlDeviceGetMigDeviceHandleByIndex(Card card, u32 index, Card *out) {
    char name[128];
    if (!card || card->mig >= 0 || index >= 16) return INVALID;
    struct card mine = {card->gpu, (int)index, card->generation};
    int code = ask(&mine, "Name", name, sizeof name);
    if (code == NOT_SUPPORTED) return NOT_FOUND;
    if (code == INVALID) return code;
    return hand_out(card->gpu, (int)index, out);
}
NUMBER(nvmlDeviceGetMaxMigDeviceCount, "MaxMigDeviceCount")
PAIR(nvmlDeviceGetMigMode, "MigMode")
PAIR(nvmlDeviceGetEccMode, "EccMode")

int nvmlDeviceGetName(Card card, char *out, u32 size) { return text(card, "Name", out, size); }
int nvmlDeviceGetUUID(Card card, char *out, u32 size) { return text(card, "UUID", out, size); }
int nvmlDeviceGetCudaComputeCapability(Card card, int *major, int *minor) {
    char value[32];
    int code = ask(card, "Capability", value, sizeof value);
    if (!code && sscanf(value, "%d.%d", major, minor) != 2) code = 999;
    return code;
}
NUMBER(nvmlDeviceGetBusType, "BusType")
NUMBER(nvmlDeviceGetArchitecture, "Architecture")

typedef struct { u64 total, free, used; } memory1;
typedef struct { u32 version; u64 total, reserved, free, used; } memory2;
static int sizes(Card card, u64 *total, u64 *reserved, u64 *used) {
    char value[128];
    int code = ask(card, "Memory", value, sizeof value);
    if (!code && sscanf(value, "%llu %llu %llu", total, reserved, used) != 3) code = 999;
    return code;
}
int nvmlDeviceGetMemoryInfo(Card card, memory1 *out) {
    u64 total = 0, reserved = 0, used = 0;
    int code = sizes(card, &total, &reserved, &used);
    if (code) return code;
    out->total = total;
    out->free = total - reserved - used;
    out->used = reserved + used; /* version 1 counts what the driver keeps for itself as used */
    return OK;
}

NUMBER(nvmlDeviceGetDisplayActive, "DisplayActive")
NUMBER(nvmlDeviceGetPowerUsage, "PowerUsage")
NUMBER(nvmlDeviceGetEnforcedPowerLimit, "EnforcedPowerLimit")
WIDE(nvmlDeviceGetTotalEnergyConsumption, "Energy")
WIDE(nvmlDeviceGetCurrentClocksThrottleReasons, "Reasons")
NUMBER(nvmlDeviceGetCurrPcieLinkGeneration, "PcieGeneration")
NUMBER(nvmlDeviceGetCurrPcieLinkWidth, "PcieWidth")
NUMBER(nvmlDeviceGetMaxPcieLinkGeneration, "MaxPcieGeneration")
NUMBER(nvmlDeviceGetMaxPcieLinkWidth, "MaxPcieWidth")
int nvmlDeviceGetUtilizationRates(Card card, u32 out[2]) { out[1] = 0; return small(card, "Utilization", out); }
int nvmlDeviceGetTemperature(Card card, u32 sensor, u32 *out) { return sensor ? INVALID : small(card, "Temperature", out); }
static int clock_of(Card card, const char *prefix, u32 kind, u32 *out) {
    char what[32];
    snprintf(what, sizeof what, "%s%u", prefix, kind); /* 1: SM, 2: memory */
    return small(card, what, out);
}
int nvmlDeviceGetClockInfo(Card card, u32 kind, u32 *out) { return clock_of(card, "Clock", kind, out); }
int nvmlDeviceGetMaxClockInfo(Card card, u32 kind, u32 *out) { return clock_of(card, "MaxClock", kind, out); }

typedef struct { u32 pid; u64 used; u32 instance, compute_instance; } process;
static int processes(Card card, const char *what, u32 *count, process *out) {
    char value[1024];
    int code = ask(card, what, value, sizeof value);
    if (code == NOT_SUPPORTED) { *count = 0; return OK; }
    if (code) return code;
    u32 found = 0, room = *count;
    for (char *rest = value, *word; (word = strtok_r(rest, " ", &rest));) {
        u32 pid;
        long long used;
        if (sscanf(word, "%u:%lld", &pid, &used) != 2) continue;
        if (out && found < room) out[found] = (process){pid, (u64)used, 0xFFFFFFFFu, 0xFFFFFFFFu};
        found++;
    }
    *count = found;
    return found && (!out || found > room) ? TOO_SMALL : OK;
}
int nvmlDeviceGetComputeRunningProcesses_v2(Card card, u32 *n, process *out) { return processes(card, "Compute", n, out); }
int nvmlDeviceGetGraphicsRunningProcesses_v2(Card card, u32 *n, process *out) { return processes(card, "Graphics", n, out); }

#ifndef OLD_DRIVER
int nvmlDeviceGetMemoryInfo_v2(Card card, memory2 *out) {
    u64 total = 0, reserved = 0, used = 0;
    if (out->version != (sizeof(memory2) | 2u << 24)) return VERSION;
    int code = sizes(card, &total, &reserved, &used);
    if (code) return code;
    out->total = total;
    out->reserved = reserved;
    out->free = total - reserved - used;
    out->used = used;
    return OK;
}
typedef struct { u32 version; int sensor; int value; } temperature;
int nvmlDeviceGetTemperatureV(Card card, temperature *out) {
    return small(card, "Temperature", (u32 *)&out->value);
}
WIDE(nvmlDeviceGetCurrentClocksEventReasons, "Reasons")
int nvmlDeviceGetComputeRunningProcesses_v3(Card card, u32 *n, process *out) { return processes(card, "Compute", n, out); }
int nvmlDeviceGetGraphicsRunningProcesses_v3(Card card, u32 *n, process *out) { return processes(card, "Graphics", n, out); }
#endif
