"""A skipped test, or a skipped module, is a failure where everything has to be tested."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


TEST = 'import pytest\n\n\ndef test_it():\n    pytest.skip("no nc")\n'
MODULE = 'import pytest\n\npytest.skip("no nc", allow_module_level=True)\n'


@pytest.mark.parametrize(
    ("skips", "ci", "code", "said"),
    [
        (TEST, "", 0, "1 skipped"),
        (TEST, "true", pytest.ExitCode.TESTS_FAILED, "nothing may be: Skipped: no nc"),
        (MODULE, "", pytest.ExitCode.NO_TESTS_COLLECTED, "1 skipped"),
        (MODULE, "true", pytest.ExitCode.INTERRUPTED, "nothing may be: Skipped: no nc"),
    ],
)
def test_a_skip_with_ci(tmp_path: Path, skips: str, ci: str, code: int, said: str) -> None:
    shutil.copy(ROOT / "conftest.py", tmp_path)
    (tmp_path / "test_it.py").write_text(skips)
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", tmp_path],
        cwd=tmp_path,
        env={**os.environ, "CI": ci, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == code, ran.stdout
    assert said in ran.stdout
