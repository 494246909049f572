"""infopt: make a language model cheaper to run, and prove it.

One model, one YAML recipe, one verdict. The command line is the product; `infopt --help` starts there.
"""

__all__ = ["__version__"]


def __getattr__(name: str) -> str:
    """`__version__` is looked up when asked for: what finds it takes a tenth of `infopt --help`."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("infopt")
    except PackageNotFoundError:  # a source tree that was never installed
        return "0+unknown"
