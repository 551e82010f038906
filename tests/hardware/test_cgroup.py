"""Control groups: the tightest limit of any level, in version 1, version 2 and both."""

import pytest
from edgefed_fake_machine import write_root
from hypothesis import given
from hypothesis import strategies as st

from edgefed.hardware.cgroup import read_cpu_quota, read_memory_limit
from edgefed.hardware.facts import Reading, Reason
from edgefed.hardware.host_files import Files

GIB = 2**30
V2, V1 = "/sys/fs/cgroup", "/sys/fs/cgroup/memory"
NONE_V1 = "9223372036854771712"


def limit_of(root, files):
    limit = read_memory_limit(Files(write_root(root, files)))
    return limit.limit_bytes.value, limit.used_bytes.value


def test_a_container_of_version_2(tmp_path):
    files = {f"{V2}/memory.max": str(8 * GIB), f"{V2}/memory.current": str(GIB), "/proc/self/cgroup": "0::/\n"}
    assert limit_of(tmp_path, files) == (8 * GIB, GIB)
    # the kernel drops inactive file pages before it kills anybody
    files[f"{V2}/memory.stat"] = f"anon 5\nfile 7\ninactive_file {GIB // 4}\n"
    assert limit_of(tmp_path, files) == (8 * GIB, GIB - GIB // 4)


def test_no_limit(tmp_path):
    assert limit_of(tmp_path, {}) == (None, None)
    files = {f"{V2}/memory.max": "max\n", f"{V2}/memory.current": "5\n"}
    limit = read_memory_limit(Files(write_root(tmp_path, files)))
    assert limit.limit_bytes.reason is limit.used_bytes.reason is Reason.ABSENT
    files = {f"{V1}/memory.limit_in_bytes": NONE_V1, f"{V1}/memory.stat": f"hierarchical_memory_limit {NONE_V1}\n"}
    assert limit_of(tmp_path / "v1", files) == (None, None)


def test_a_limit_may_stand_at_any_level(tmp_path):
    files = {
        "/proc/self/cgroup": "0::/user.slice/app.scope\n",
        f"{V2}/user.slice/app.scope/memory.max": "max\n",
        f"{V2}/user.slice/app.scope/memory.current": str(GIB),
        f"{V2}/user.slice/memory.max": str(4 * GIB),
        f"{V2}/user.slice/memory.current": str(3 * GIB),
    }
    assert limit_of(tmp_path, files) == (4 * GIB, 3 * GIB)


def test_room_is_that_of_the_fullest_level_and_the_limit_is_the_lowest(tmp_path):
    files = {
        "/proc/self/cgroup": "0::/a/b\n",
        f"{V2}/a/b/memory.max": str(4 * GIB),
        f"{V2}/a/b/memory.current": str(GIB),
        f"{V2}/a/memory.max": str(16 * GIB),
        f"{V2}/a/memory.current": str(14 * GIB),  # neighbours left 2 GiB
    }
    assert limit_of(tmp_path, files) == (4 * GIB, 2 * GIB)


def test_a_group_that_is_overfull_has_no_room_left(tmp_path):
    files = {f"{V2}/memory.max": str(GIB), f"{V2}/memory.current": str(2 * GIB)}
    assert limit_of(tmp_path, files) == (GIB, GIB)


def test_the_soft_limit_of_version_2_is_one(tmp_path):
    files = {f"{V2}/memory.max": str(8 * GIB), f"{V2}/memory.high": str(6 * GIB), f"{V2}/memory.current": "0"}
    assert limit_of(tmp_path, files) == (6 * GIB, 0)


@pytest.mark.parametrize("path", ["/docker/0123abcd", "/../sibling", "/a/../../b", "//"])
def test_a_path_of_another_namespace_means_the_mounts_root(tmp_path, path):
    files = {"/proc/self/cgroup": f"0::{path}\n", f"{V2}/memory.max": str(GIB), f"{V2}/memory.current": "1"}
    assert limit_of(tmp_path, files) == (GIB, 1)


def test_a_path_does_not_lead_out_of_the_mount(tmp_path):
    files = {"/proc/self/cgroup": "0::/../sibling\n", "/sys/fs/sibling/memory.max": "1000", f"{V2}/memory.max": "2000"}
    assert limit_of(tmp_path, files) == (2000, None)


def test_everything_that_the_kernel_can_reclaim_is_room(tmp_path):
    """A container that has read a checkpoint shows it as active file pages; shared memory cannot be dropped."""
    files = {
        f"{V2}/memory.max": str(8 * GIB),
        f"{V2}/memory.current": str(7 * GIB),
        f"{V2}/memory.stat": (
            f"anon {GIB}\nfile {6 * GIB}\nshmem {GIB}\ninactive_file {GIB}\nactive_file {4 * GIB}\n"
            f"slab_reclaimable {GIB // 2}\nslab_unreclaimable {GIB // 4}\n"
        ),
    }
    assert limit_of(tmp_path, files) == (8 * GIB, 3 * GIB // 2)


def test_active_file_pages_of_version_1(tmp_path):
    files = {
        f"{V1}/memory.limit_in_bytes": str(8 * GIB),
        f"{V1}/memory.usage_in_bytes": str(7 * GIB),
        f"{V1}/memory.stat": f"active_file 1\ntotal_inactive_file {GIB}\ntotal_active_file {4 * GIB}\n",
    }
    assert limit_of(tmp_path, files) == (8 * GIB, 2 * GIB)


def test_version_1(tmp_path):
    files = {
        "/proc/self/cgroup": "9:name=systemd:/\n4:memory:/docker/abc\n0::/\n",
        f"{V1}/docker/abc/memory.limit_in_bytes": str(2 * GIB),
        f"{V1}/docker/abc/memory.usage_in_bytes": str(GIB),
        f"{V1}/docker/abc/memory.stat": f"cache 9\ntotal_inactive_file {GIB // 2}\n",
        f"{V1}/memory.limit_in_bytes": NONE_V1,
        f"{V1}/memory.usage_in_bytes": str(50 * GIB),
    }
    assert limit_of(tmp_path, files) == (2 * GIB, GIB // 2)


def test_version_1_reports_a_limit_above_its_own_root(tmp_path):
    files = {
        f"{V1}/memory.limit_in_bytes": NONE_V1,
        f"{V1}/memory.usage_in_bytes": str(GIB),
        f"{V1}/memory.stat": f"hierarchical_memory_limit {3 * GIB}\ntotal_inactive_file 0\n",
    }
    assert limit_of(tmp_path, files) == (3 * GIB, GIB)


def test_both_versions_at_once(tmp_path):
    files = {
        "/proc/self/cgroup": "4:memory:/x\n0::/y\n",
        f"{V1}/x/memory.limit_in_bytes": str(5 * GIB),
        f"{V1}/x/memory.usage_in_bytes": "0",
        f"{V2}/unified/y/memory.max": str(3 * GIB),
        f"{V2}/unified/y/memory.current": "7",
    }
    assert limit_of(tmp_path, files) == (3 * GIB, 7)


def test_a_limit_with_an_unknown_use(tmp_path):
    limit = read_memory_limit(Files(write_root(tmp_path, {f"{V2}/memory.max": str(GIB)})))
    assert limit.limit_bytes.value == GIB
    assert limit.used_bytes.reason is Reason.ABSENT


@pytest.mark.parametrize("text", ["", "lots", "-5", "1e9", "0x10", b"\xff\xfe", "9" * 40])
def test_a_limit_that_is_not_a_number_is_reported(tmp_path, text):
    limit = read_memory_limit(Files(write_root(tmp_path, {f"{V2}/memory.max": text}))).limit_bytes
    assert limit.reason is Reason.FAILED
    assert limit.source == f"{V2}/memory.max"


def test_a_limit_that_is_forbidden_is_not_no_limit():
    class Forbidden:
        def text(self, path):
            reason = Reason.NO_PERMISSION if path.endswith("memory.max") else Reason.ABSENT
            return Reading.missing(reason, path, "x")

        def exists(self, path):
            return path == V2

    assert read_memory_limit(Forbidden()).limit_bytes.reason is Reason.NO_PERMISSION


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({f"{V2}/cpu.max": "200000 100000\n"}, 2),
        ({f"{V2}/cpu.max": "max 100000\n"}, None),
        ({f"{V2}/cpu.max": "150000\n"}, None),
        ({"/proc/self/cgroup": "0::/a\n", f"{V2}/a/cpu.max": "50000 100000\n", f"{V2}/cpu.max": "max 100000\n"}, 0.5),
        ({f"{V2}/cpu/cpu.cfs_quota_us": "300000\n", f"{V2}/cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({f"{V2}/cpu,cpuacct/cpu.cfs_quota_us": "-1\n", f"{V2}/cpu,cpuacct/cpu.cfs_period_us": "100000\n"}, None),
        ({f"{V2}/cpu/cpu.cfs_quota_us": "300000\n", f"{V2}/cpu/cpu.cfs_period_us": "0\n"}, None),
    ],
)
def test_the_processor_quota(tmp_path, files, quota):
    assert read_cpu_quota(Files(write_root(tmp_path, files))).value == quota


class Texts:
    def __init__(self, texts):
        self.texts = texts

    def text(self, path):
        found = self.texts.get(path)
        return Reading.missing(Reason.ABSENT, path, "x") if found is None else Reading.of(found, path)

    def exists(self, path):
        return any(name.startswith(path) for name in self.texts)


@given(st.lists(st.tuples(st.none() | st.integers(0, 2**50), st.integers(0, 2**50), st.integers(0, 2**50)), max_size=4))
def test_the_room_is_never_negative_nor_above_any_limit(levels):
    texts, folder = {}, V2
    own = "/".join(f"l{n}" for n in range(len(levels)))
    texts["/proc/self/cgroup"] = f"0::/{own}\n"
    for number, (limit, used, cache) in enumerate(levels):
        folder += f"/l{number}"
        texts[f"{folder}/memory.max"] = "max" if limit is None else str(limit)
        texts[f"{folder}/memory.current"] = str(used)
        texts[f"{folder}/memory.stat"] = f"inactive_file {cache}\n"
    found = read_memory_limit(Texts(texts))
    limits = [limit for limit, _, _ in levels if limit is not None]
    rooms = [max(0, limit - max(0, used - cache)) for limit, used, cache in levels if limit is not None]
    assert found.limit_bytes.value == (min(limits) if limits else None)
    if limits:
        # the least limit is the most that can be left, whatever a parent has
        assert found.limit_bytes.value - found.used_bytes.value == min([*rooms, *limits])


@given(st.text(max_size=200), st.text(max_size=60), st.text(max_size=60))
def test_an_empty_text_is_an_error(own, limit, used):
    texts = {"/proc/self/cgroup": own, f"{V2}/memory.max": limit, f"{V2}/memory.current": used, f"{V2}/cpu.max": used}
    found = read_memory_limit(Texts(texts))
    assert found.limit_bytes.value is None or found.limit_bytes.value >= 0
    read_cpu_quota(Texts(texts))
