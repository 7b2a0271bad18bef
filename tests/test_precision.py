"""The precision follows from what the processor says of itself."""

from step3vl.precision import fast_precision


def test_flags_decide(tmp_path):
    (tmp_path / "new").write_text("flags : fpu avx512f avx512_bf16\n")
    (tmp_path / "old").write_text("flags : fpu avx2\n")
    assert fast_precision("cpu", tmp_path / "new") == "bf16-mixed"
    assert fast_precision("cpu", tmp_path / "old") == "32-true"
    assert fast_precision("cpu", tmp_path / "missing") == "32-true"
