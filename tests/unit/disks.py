"""Disks that are full or broken."""

import contextlib
import resource
from collections.abc import Iterator


@contextlib.contextmanager
def full_disk(bytes_left: int) -> Iterator[None]:
    """No file may grow beyond a size, so that real writes fail half-way, also those of C++ and Rust libraries."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
