from collections.abc import Sequence

def advise_large_pages(address: int, nbytes: int) -> None: ...
def instruction_sets() -> list[str]: ...
def scale_add_cast(
    shape: Sequence[int],
    src: int,
    src_dtype: int,
    src_strides: Sequence[int],
    dst: int,
    dst_dtype: int,
    dst_strides: Sequence[int],
    scale: int,
    left: int,
    left_stride: int,
    right: int,
    rank: int,
    acts: int,
    threads: int,
    instruction_set: str,
) -> None: ...
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
