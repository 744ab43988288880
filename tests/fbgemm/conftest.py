"""Prints the differences that the comparison found."""

FIGURES: dict[str, dict[str, float]] = {}


def pytest_terminal_summary(terminalreporter) -> None:
    """Print the largest differences by case."""
    if not FIGURES:
        return
    import fbgemm_gpu
    import torch

    write = terminalreporter.write_line
    version = getattr(fbgemm_gpu, "__version__", "?")
    write(f"largest differences from FBGEMM {version}, torch {torch.__version__}:")
    for case, errors in FIGURES.items():
        write(f"  {case:<58} " + "  ".join(f"{k} {v:.1e}" for k, v in errors.items()))
