"""A Jetson's own sensors, below /sys, /proc and /etc. Reads only: setting a power mode may reboot the board.

Paths and their meaning follow NVIDIA's documentation and what is seen on Orin (L4T 35, 36) and Thor (L4T 38, 39).
"""

from __future__ import annotations

import re
from typing import Any

from edgefed.hardware.facts import Reading, Reason, TegraFacts
from edgefed.hardware.host_files import Files, field_of, parse_meminfo

JETPACK = {
    "36.3": "6.0",
    "36.4.0": "6.1",
    "36.4.3": "6.2",
    "36.4.4": "6.2.1",
    "36.4.7": "6.2.1",
    "36.5.0": "6.2.2",
    "36.5.2": "6.2.3",
    "38.2": "7.0",
    "38.4.0": "7.1",
    "39.2.0": "7.2",
    "39.2.1": "7.2.1",
    "39.2.2": "7.2.2",
    "35": "5.1.x",
}
"""L4T release (or its first two or one numbers) -> JetPack."""
JETPACK_MAJOR = {32: 4, 34: 5, 35: 5, 36: 6, 38: 7, 39: 7}
SOC_CAPABILITY = {"tegra210": (5, 3), "tegra186": (6, 2), "tegra194": (7, 2), "tegra234": (8, 7), "tegra264": (11, 0)}
GPU_NODES = {"gpu", "ga10b", "gv11b", "gp10b", "gb10b"}
TOTAL_RAILS = ("VDD_IN", "VIN", "VIN_SYS_5V0", "5V_IN", "POM_5V_IN")
"""Rails that feed the whole module. On Orin Nano VDD_IN; VIN on Thor's carrier."""


def read_tegra(files: Files) -> TegraFacts | None:
    """All sensors of a Jetson; None when nothing says that this is one."""
    l4t, soc, model = _l4t(files), _soc(files), _model(files)
    kernel = files.text("/proc/sys/kernel/osrelease").value or files.text("/proc/version").value or ""
    is_jetson = l4t.known or soc.known or "jetson" in (model.value or "").lower()
    if not is_jetson and "-tegra" not in kernel:
        return None
    folder = _gpu_folder(files)
    temperatures = _temperatures(files)
    rails, total = _power(files)
    meminfo = files.text("/proc/meminfo")
    return TegraFacts(
        l4t=l4t,
        jetpack=_jetpack(l4t),
        model=model,
        soc=soc,
        gpu_clock_mhz=_hertz(files, folder, "cur_freq"),
        gpu_clock_max_mhz=_hertz(files, folder, "max_freq"),
        gpu_governor=_word(files, f"{folder}/governor") if folder else _no_folder(),
        gpu_load_percent=_load(files, folder),
        memory_clock_mhz=_memory_clock(files),
        temperatures_celsius=temperatures,
        temperature_celsius=_headline(temperatures),
        power_watts=total,
        power_rails_watts=rails,
        power_mode=read_power_mode(files),
        nvmap_used_bytes=field_of(meminfo, parse_meminfo(meminfo.value or ""), "NvMapMemUsed"),
    )


def _l4t(files: Files) -> Reading[str]:
    text = files.text("/etc/nv_tegra_release")
    match = re.search(r"^# R(\d{2,3}) \(release\), REVISION: (\d+(?:\.\d+)*)", text.value or "", re.MULTILINE)
    if match:
        return Reading.of(f"{match[1]}.{match[2]}", text.source)
    if text.known:
        missing = Reading.missing(Reason.FAILED, text.source, "no release line in it")
    else:
        missing = text.without_value()
    if not files.exists("/proc/device-tree/compatible"):
        return missing  # no board with a device tree: not worth a question to the package manager
    package = files.ask("l4t_package")
    match = re.match(r"(\d{2,3}(?:\.\d+)+)", package.value or "")
    return Reading.of(match[1], package.source) if match else missing


def _jetpack(l4t: Reading[str]) -> Reading[str]:
    if l4t.value is None:
        return l4t.without_value()
    numbers = l4t.value.split(".")
    if len(numbers) == 2:
        numbers.append("0")
    for count in (3, 2, 1):
        if (release := JETPACK.get(".".join(numbers[:count]))) is not None:
            return Reading.of(release, f"L4T {l4t.value}")
    major = JETPACK_MAJOR.get(int(numbers[0]))
    if major is None:
        return Reading.missing(Reason.FAILED, f"L4T {l4t.value}", "a release that edgefed does not know")
    return Reading.of(f">= {major}", f"L4T {l4t.value}, which is not in the table")


def _soc(files: Files) -> Reading[str]:
    for path in ("/proc/device-tree/compatible", "/sys/firmware/devicetree/base/compatible"):
        text = files.text(path)
        match = re.search(r"nvidia,(tegra\d+)", (text.value or "").split("\0")[-1])
        match = match or re.search(r"nvidia,(tegra\d+)", text.value or "")
        if match:
            return Reading.of(match[1], path)
    if not text.known:
        return text.without_value()
    return Reading.missing(Reason.ABSENT, text.source, "no Tegra in it")


def _model(files: Files) -> Reading[str]:
    for path in ("/sys/firmware/devicetree/base/model", "/proc/device-tree/model"):
        text = files.text(path)
        if text.value is not None and (name := text.value.strip(" \0\n\t")):
            return Reading.of(name[:120], path)
    return Reading.missing(text.reason or Reason.FAILED, text.source, text.detail or "empty")


def _gpu_folder(files: Files) -> str:
    """Return the GPU's folder in /sys/class/devfreq, found by its device-tree node (Orin) or its own name (Thor)."""
    base = "/sys/class/devfreq"
    names = files.names(base)
    for name in names:
        node = (files.text(f"{base}/{name}/device/of_node/name").value or "").strip(" \0\n")
        if node in GPU_NODES:
            return f"{base}/{name}"
    for name in names:
        if name.startswith("gpu-gpc") or name.rpartition(".")[2] in GPU_NODES:
            return f"{base}/{name}"
    return ""


def _no_folder() -> Reading[Any]:
    return Reading.missing(Reason.ABSENT, "/sys/class/devfreq", "no GPU among the devices there")


def _word(files: Files, path: str) -> Reading[str]:
    text = files.text(path)
    if text.value is not None and not text.value.strip():
        return Reading.missing(Reason.FAILED, path, "empty")
    return text.map(lambda value: value.strip()[:80])


def _number(files: Files, path: str) -> Reading[int]:
    text = files.text(path)
    if text.value is None:
        return text.without_value(path)
    if not re.fullmatch(r"\s*-?[0-9]{1,18}\s*", text.value):
        return Reading.missing(Reason.FAILED, path, f"{text.value[:40]!r} is not a number")
    return Reading.of(int(text.value), path)


def _hertz(files: Files, folder: str, name: str) -> Reading[int]:
    if not folder:
        return _no_folder()
    reading = _number(files, f"{folder}/{name}")
    if reading.value is not None and not 10**6 <= reading.value < 10**11:
        return Reading.missing(Reason.IMPLAUSIBLE, reading.source, f"{reading.value} Hz")
    return reading.map(lambda hertz: round(hertz / 1e6))


def _load(files: Files, folder: str) -> Reading[float]:
    if not folder:
        return _no_folder()
    reading = _number(files, f"{folder}/device/load")  # per mille
    if reading.value is not None and not 0 <= reading.value <= 1000:
        return Reading.missing(Reason.IMPLAUSIBLE, reading.source, f"{reading.value} per mille")
    return reading.map(lambda load: load / 10)


def _memory_clock(files: Files) -> Reading[int]:
    first = _hertz(files, "/sys/kernel/debug/bpmp/debug/clk/emc", "rate")
    if first.known:
        return first
    for name in files.names("/sys/class/devfreq"):
        if "bwmgr" in name or "emc" in name:
            second = _hertz(files, f"/sys/class/devfreq/{name}", "cur_freq")
            if second.known:
                return second
    return first


def zone_temperature(files: Files, path: str) -> Reading[float]:
    """One thermal zone's file, in millidegrees. -256000 is a zone whose processor is off, 0 one that never measured."""
    reading = _number(files, path)
    if reading.value is not None and (not -50_000 <= reading.value <= 200_000 or reading.value in (0, -1)):
        return Reading.missing(Reason.IMPLAUSIBLE, path, f"{reading.value} millidegrees")
    return reading.map(lambda value: value / 1000)


def _temperatures(files: Files) -> Reading[dict[str, float]]:
    """Thermal zone -> degrees Celsius, without those that are switched off."""
    for base in ("/sys/class/thermal", "/sys/devices/virtual/thermal"):
        found: dict[str, float] = {}
        for zone in files.names(base):
            if zone.startswith("thermal_zone"):
                name, value = _word(files, f"{base}/{zone}/type"), zone_temperature(files, f"{base}/{zone}/temp")
                if name.value is not None and value.value is not None:
                    found[name.value] = value.value
        if found:
            return Reading.of(found, base)
    return Reading.missing(Reason.ABSENT, "/sys/class/thermal", "no zone reports a temperature")


def _headline(temperatures: Reading[dict[str, float]]) -> Reading[float]:
    if temperatures.value is None:
        return temperatures.without_value()
    for wanted in ("tj", "gpu"):
        for name, value in sorted(temperatures.value.items()):
            if name.lower().startswith(wanted):
                return Reading.of(value, f"{temperatures.source} {name}")
    name, value = max(temperatures.value.items(), key=lambda item: item[1])
    return Reading.of(value, f"{temperatures.source} {name} (the warmest: neither tj nor gpu is there)")


def _power(files: Files) -> tuple[Reading[dict[str, float]], Reading[float]]:
    """(rail -> watts, the module's watts): INA3221 on Orin, INA238 on Thor's carrier."""
    rails: dict[str, float] = {}
    problem: Reading[int] | None = None
    for folder, chip in _power_monitors(files):
        if chip == "ina238":
            watts = _number(files, f"{folder}/power1_input")  # microwatts
            name = _word(files, f"{folder}/in1_label").value or _word(files, f"{folder}/device/of_node/label").value
            if watts.value is not None and 0 <= watts.value < 10**9:
                rails[(name or "VIN").strip("\0")] = watts.value / 1e6
            continue
        for channel in range(1, 7):  # channel 7 is the chip's own sum
            label = _word(files, f"{folder}/in{channel}_label")
            if label.value is None or label.value.upper() in ("NC", "SUM OF SHUNT VOLTAGES"):
                continue
            volts, amperes = (_number(files, f"{folder}/{kind}{channel}_input") for kind in ("in", "curr"))
            if volts.value is None or amperes.value is None:
                problem = problem or (volts if volts.value is None else amperes)
            elif 0 <= volts.value < 10**5 and 0 <= amperes.value < 10**6:
                rails[label.value] = volts.value * amperes.value / 1e6  # mV x mA
    if not rails:
        missing = problem or Reading.missing(Reason.ABSENT, "/sys/bus/i2c/devices/*/hwmon", "no power monitor")
        return missing.without_value(), missing.without_value()
    source = "/sys/bus/i2c/devices/*/hwmon"
    total = next((name for name in TOTAL_RAILS if name in rails), None)
    if total is None:
        return Reading.of(rails, source), Reading.of(sum(rails.values()), f"{source}, sum of {', '.join(rails)}")
    return Reading.of(rails, source), Reading.of(rails[total], f"{source} {total}")


def _power_monitors(files: Files) -> list[tuple[str, str]]:
    """(folder, chip) of each power monitor that we know."""
    base, folders = "/sys/bus/i2c/devices", []
    for device in files.names(base):
        # the name stands at the bus device, at the monitor, or at both
        outer = (files.text(f"{base}/{device}/name").value or "").strip()
        for monitor in files.names(f"{base}/{device}/hwmon"):
            folder = f"{base}/{device}/hwmon/{monitor}"
            inner = (files.text(f"{folder}/name").value or "").strip()
            chip = next((chip for chip in ("ina3221", "ina238") if chip in (outer.rstrip("x"), inner.rstrip("x"))), "")
            folders += [(folder, chip)] if chip else []
    return folders


def read_power_mode(files: Files) -> Reading[str]:
    """Name of the nvpmodel mode, or ``mode 2`` when no configuration names it."""
    status = files.text("/var/lib/nvpmodel/status")
    match = re.search(r"pmode:\s*(\d+)", status.value or "")
    configuration = files.text("/etc/nvpmodel.conf")
    modes = re.finditer(r"<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=([^\s>]+)", configuration.value or "")
    names = {int(mode[1]): mode[2] for mode in modes}
    source = status.source
    if match:
        mode = int(match[1])
    else:
        answer = files.ask("nvpmodel")
        if answered := re.search(r"NV Power Mode:\s*(\S+)", answer.value or ""):
            return Reading.of(answered[1], answer.source)
        detail = "no pmode line in it" if status.known else status.detail
        return Reading.missing(status.reason or Reason.FAILED, status.source, detail)
    return Reading.of(names.get(mode, f"mode {mode}"), source)
