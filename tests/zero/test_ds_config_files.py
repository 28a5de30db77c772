"""The file of a DeepSpeed JSON: which one it is, and what is wrong with it."""

import json

import pytest
from processes import ROOT

from mst_ds.zero import load_ds_config


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 1,\n "b" 2}', "is not JSON: Expecting ':' delimiter at line 2, column 6"),
        ("[]", "the DeepSpeed config is a list; allowed: an object"),
        ("\xff\xfe", "is not UTF-8 text"),
    ],
)
def test_a_bad_file_is_refused(tmp_path, content, message):
    path = tmp_path / "ds.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        load_ds_config(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"allowed: an existing DeepSpeed JSON file, or one that ships: zero2_"):
        load_ds_config(tmp_path / "ds.json")


def test_a_shipped_file_goes_by_its_name_where_the_user_has_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = ROOT / "ds_configs" / "zero2_mst.json"
    assert load_ds_config("zero2_mst.json") == json.loads(shipped.read_text(encoding="utf-8"))
    with pytest.raises(ValueError, match="allowed: an existing DeepSpeed JSON file"):
        load_ds_config("elsewhere/zero2_mst.json")
    (tmp_path / "zero2_mst.json").write_text("{}", encoding="utf-8")
    assert load_ds_config("zero2_mst.json") == {}


def test_numbers_that_json_does_not_have(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text('{"gradient_clipping": NaN}')
    with pytest.raises(ValueError, match="has the value NaN"):
        load_ds_config(path)
