import subprocess
import sys


def test_the_import_is_light():
    code = "import sys, modeling_vwlmm; print([name for name in ('trl', 'peft') if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
