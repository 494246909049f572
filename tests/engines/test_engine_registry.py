from __future__ import annotations

import subprocess
import sys

import pytest

from infopt import engines
from infopt.errors import InputError


def test_the_folder_is_the_registry() -> None:
    assert "transformers" in engines.names()
    assert engines.find("transformers").__name__ == "TransformersEngine"


def test_an_unknown_engine_is_refused_with_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'transformers'"):
        engines.find("transformer")


def test_looking_an_engine_up_imports_no_torch() -> None:
    code = "import sys; from infopt import engines; engines.find('transformers'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
