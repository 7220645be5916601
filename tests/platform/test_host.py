"""What the machine says about memory."""

import subprocess
import sys

from adamoe_dist.platform import host

PROGRAM = """
import subprocess, sys
held = bytearray(800 << 20)
small = "import runpy, sys; print(runpy.run_path(sys.argv[1])['peak_resident_bytes']())"
print(subprocess.run([sys.executable, "-c", small, sys.argv[1]], capture_output=True, text=True).stdout)
"""


def test_a_process_that_a_larger_one_started_has_a_peak_of_its_own() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, host.__file__], capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) < 200 << 20


def test_the_peak_rises_with_what_is_held() -> None:
    before = host.peak_resident_bytes()
    held = bytearray(b"x") * (before + (64 << 20))
    assert host.peak_resident_bytes() >= len(held) > before


def test_available_memory_is_some_of_the_machines() -> None:
    available = host.available_bytes()
    assert available is not None and 0 < available < 1 << 50
