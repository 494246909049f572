"""infopt: make a language model cheaper to run, and prove it.

One model, one YAML recipe, one verdict. The command line is the product; `infopt --help` starts there.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("infopt")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["__version__"]
