"""The tools that the GPU script starts: what it reads from them, and that it can do without."""

from __future__ import annotations

import sys

import pytest
import torch

from bench import gpu_tools
from bench.gpu_times import BASE, products_work

NCU = """==PROF== Connected to process 7
a line of the program
"ID","Process ID","Kernel","Section Name","Metric Name","Metric Unit","Metric Value","Rule"
"0","7","up_kernel","Launch Statistics","Registers Per Thread","register/thread","128",""
"0","7","up_kernel","Occupancy","Achieved Occupancy","%","24.8",""
"0","7","up_kernel","Occupancy","","","","a rule"
"""


def program(tmp_path, monkeypatch, text: str, code: int = 0) -> None:
    """Every tool is a program that prints ``text`` and its arguments."""
    path = tmp_path / "tool"
    path.write_text(
        f"#!{sys.executable}\nimport sys, time\nprint({text!r})\n"
        f"print(sys.argv[1:], file=sys.stderr)\nsys.exit({code})\n"
    )
    path.chmod(0o755)
    monkeypatch.setattr(gpu_tools, "tool", lambda name: str(path))


def test_tools_that_are_missing_leave_out_their_part(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(gpu_tools, "tool", lambda name: None)
    assert gpu_tools.sanitize("memcheck", 9, tmp_path) == {
        "left out": "compute-sanitizer is not installed"
    }
    assert gpu_tools.profile("up", 9, tmp_path) == {"left out": "ncu is not installed"}


def test_tools_are_found_in_the_toolkit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert gpu_tools.tool("some-tool") is None
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "some-tool").touch(mode=0o755)
    assert gpu_tools.tool("some-tool") == str(tmp_path / "bin" / "some-tool")


def test_the_sanitizer_s_findings_are_failures(tmp_path, monkeypatch):
    program(tmp_path, monkeypatch, "========= ERROR SUMMARY: 0 errors")
    found = gpu_tools.sanitize("memcheck", 600, tmp_path)
    assert found["exit"] == 0 and found["summary"] == ["========= ERROR SUMMARY: 0 errors"]
    assert "failures" not in found
    log = (tmp_path / "memcheck.log").read_text()
    assert "'--tool', 'memcheck'" in log and "'bench.gpu_tools', 'tiny'" in log
    program(tmp_path, monkeypatch, "========= Invalid __global__ read", gpu_tools._FOUND)
    assert any("Invalid" in x for x in gpu_tools.sanitize("memcheck", 600, tmp_path)["failures"])


def test_a_tool_that_is_too_slow_is_left_out(tmp_path, monkeypatch):
    path = tmp_path / "tool"
    path.write_text(
        f"#!{sys.executable}\nimport time\nprint('begun', flush=True)\ntime.sleep(60)\n"
    )
    path.chmod(0o755)
    monkeypatch.setattr(gpu_tools, "tool", lambda name: str(path))
    assert "not done in 1 s" in gpu_tools.sanitize("racecheck", 1, tmp_path)["left out"]


def test_metrics_are_read_from_the_profiler_s_table(tmp_path, monkeypatch):
    assert gpu_tools.ncu_metrics(NCU) == {
        "Registers Per Thread": "128 register/thread",
        "Achieved Occupancy": "24.8 %",
    }
    program(tmp_path, monkeypatch, NCU)
    assert gpu_tools.profile("up", 600, tmp_path)["metrics"]["Achieved Occupancy"] == "24.8 %"
    program(tmp_path, monkeypatch, "==ERROR== no permission", 1)
    assert "no permission" in gpu_tools.profile("up", 600, tmp_path)["error"]


def test_all_products_are_profiled():
    assert set(gpu_tools.PROFILED) == set(products_work(BASE, backward=True))


@pytest.mark.parametrize(
    ("code", "output", "found"),
    [
        (0, "....\n4 passed in 2s", {"summary": "4 passed in 2s"}),
        (0, "SKIPPED [1] no GPU\n1 skipped in 2s", {"left out": "SKIPPED [1] no GPU"}),
        (5, "SKIPPED [1] no GPU\n1 skipped in 2s", {"left out": "SKIPPED [1] no GPU"}),
        (1, "E\n1 failed, 1 skipped", {"summary": "1 failed, 1 skipped",
                                       "failures": ["E", "1 failed, 1 skipped"]}),
        (2, "", {"summary": "", "failures": ["no output, exit code 2"]}),
    ],
)  # fmt: skip
def test_what_pytest_said(code, output, found):
    assert gpu_tools.pytest_result(code, output) == found


def test_the_tiny_cases_are_ten():
    pytest.importorskip("triton", reason="triton is not installed")
    names = [name for name, _ in gpu_tools.items(torch.device("cpu"))]
    assert len(names) == len(set(names)) == 10


def test_without_a_gpu_it_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("a GPU is there")
    assert gpu_tools.main(["tiny"]) == 2
    assert "no GPU" in capsys.readouterr().err
