"""The benchmarks of the report's tables, read from the hub's own columns in a local folder.

One class a benchmark, one card in configs/benchmark. Prompts, answer forms and means are those of the public harnesses;
where ours differ, docs/evaluation.md says why.
"""

from .choice import AI2D, BLINK, MMMU, MMVP, AllAngles, CCBench, MMBench, MMStar, VStar
from .counting import CountBench
from .diagrams import HumanEvalV
from .hub import HubBenchmark
from .mathematics import AIME2025, HMMT2025, MathVision, MathVista
from .pointing import OSWorldG, RefCOCO, ScreenSpotPro, ScreenSpotV2
from .programs import LiveCodeBench
from .reading import OCRBench, SimpleVQA
from .reasoning import PhyX, ReMI

__all__ = [
    "AI2D",
    "AIME2025",
    "BLINK",
    "HMMT2025",
    "MMMU",
    "MMVP",
    "AllAngles",
    "CCBench",
    "CountBench",
    "HubBenchmark",
    "HumanEvalV",
    "LiveCodeBench",
    "MMBench",
    "MMStar",
    "MathVision",
    "MathVista",
    "OCRBench",
    "OSWorldG",
    "PhyX",
    "ReMI",
    "RefCOCO",
    "ScreenSpotPro",
    "ScreenSpotV2",
    "SimpleVQA",
    "VStar",
]
