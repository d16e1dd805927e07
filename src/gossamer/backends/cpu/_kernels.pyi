def attend(
    isa: str,
    dtype: int,
    q: int,
    q_strides: list[int],
    k: int,
    k_strides: list[int],
    v: int,
    v_strides: list[int],
    out: int,
    out_strides: list[int],
    lse: int,
    sinks: int,
    sizes: list[int],
    arrays: list[int],
    limit: int,
    causal: bool,
    scale: float,
    softcap: float,
    threads: int,
    /,
) -> None: ...
def prefer_huge_pages(begin: int, size: int, /) -> None: ...
def supported() -> list[str]: ...
def prefers_bf16_dot() -> bool: ...
def has_openmp() -> bool: ...
