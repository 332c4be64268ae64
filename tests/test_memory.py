"""What a process frees it keeps: seen in the pages that the system has to give it."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

CODE = """
import resource, threading
import numpy as np
from wsi.memory import keep_freed_memory
if {keep}:
    assert keep_freed_memory()

def pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(12 << 20, np.uint8), np.ones(100 << 20, np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def work():
    pages()
    print(pages())

work()
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library: nothing is set")
def test_the_second_time_no_page_comes_from_the_system_in_any_thread() -> None:
    def pages(keep: bool) -> list[int]:
        call = [sys.executable, "-c", CODE.format(keep=keep)]
        return [int(n) for n in subprocess.run(call, capture_output=True, text=True, check=True).stdout.split()]

    assert max(pages(keep=True)) < 20
    # numpy asks for huge pages of 2 MiB where the system has them: at least one for each of these
    assert min(pages(keep=False)) >= 50
