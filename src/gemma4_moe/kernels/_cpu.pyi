from collections.abc import Sequence

def instruction_sets() -> list[str]: ...
def prefer_huge_pages(address: int, nbytes: int) -> None:
    """Ask the system to back fresh memory with huge pages, where it has them."""

def scale_cast(
    shape: Sequence[int],
    src: int,
    src_dtype: int,
    src_strides: Sequence[int],
    dst: int,
    dst_dtype: int,
    dst_strides: Sequence[int],
    scale: int,
    threads: int,
    instruction_set: str,
) -> None: ...
