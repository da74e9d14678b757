"""A mistyped path is refused at once, with the name that was probably meant."""

import subprocess
import sys

import pytest

from unicl_fast.dataset.manifest import Manifest
from unicl_fast.system.paths import nearest_name


def test_the_nearest_name_is_said(tmp_path, monkeypatch):
    (tmp_path / "packed" / "photos").mkdir(parents=True)
    assert nearest_name(tmp_path / "packed" / "potos") == f"; {tmp_path}/packed/photos is there"
    assert nearest_name(f"{tmp_path}/pakced/photos/") == f"; {tmp_path}/packed is there"
    assert nearest_name(tmp_path / "packed" / "xyz") == ""
    monkeypatch.chdir(tmp_path)
    assert nearest_name("packd") == "; packed is there"
    with pytest.raises(FileNotFoundError, match="there is no such folder; packed/photos is there"):
        Manifest.load("packed/photo")


@pytest.mark.parametrize("option", ["--data.train", "--data.evaluate"])
def test_unicl_pretrain_does_not_import_torch_to_refuse_a_path(tmp_path, option):
    code = (
        "import sys\n"
        "from unicl_fast.tools.pretrain import main\n"
        "try:\n"
        "    main(sys.argv[1:])\n"
        "except SystemExit as stop:\n"
        "    sys.exit(3 if {'torch', 'numba'} & set(sys.modules) else stop.code)\n"
    )
    words = ["--preset", "digits-small", "--out", tmp_path / "run", option, tmp_path / "no=0.5"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert f"{tmp_path}/no=0.5 is not a packed data set: there is no such folder" in done.stderr
