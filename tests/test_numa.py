"""CPUs near a GPU, from tables as nvidia-smi and the kernel write them."""

from __future__ import annotations

from pathlib import Path

from runner.cluster.ray.numa import cpus_near, visible

LISTED = "0, GPU-aa, 00000000:18:00.0\n1, GPU-bb, 00000000:2A:00.0\n2, GPU-cc, 00000000:9A:00.0\n"


def test_devices_in_the_order_that_the_process_sees() -> None:
    assert visible(LISTED, None) == ["00000000:18:00.0", "00000000:2A:00.0", "00000000:9A:00.0"]
    assert visible(LISTED, "2,0") == ["00000000:9A:00.0", "00000000:18:00.0"]
    assert visible(LISTED, "GPU-bb, 7") == ["00000000:2A:00.0"] and visible(LISTED, "") == []


def test_the_cpus_of_its_numa_node(tmp_path: Path) -> None:
    device = tmp_path / "0000:2a:00.0"
    device.mkdir()
    (device / "local_cpulist").write_text("0-3,48,50-51\n")
    assert cpus_near("00000000:2A:00.0", tmp_path) == {0, 1, 2, 3, 48, 50, 51}
    assert cpus_near("00000000:18:00.0", tmp_path) == set()
