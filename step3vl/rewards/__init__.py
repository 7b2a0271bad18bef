"""What an answer is worth in reinforcement learning (report, rewards): small callables, added up by a rubric."""

from .base import Answered, EachAnswer, Reward
from .behaviour import Calibration, Citations, LanguageConsistency
from .choice import Choice
from .format import BoxedOnce, Pattern, ThinkOnce
from .genrm import GenRM
from .grounding import BoxOverlap, Click, EuclideanPoint, GaussianPoint
from .length import SoftOverlong
from .matching import BoxMatching, PointMatching
from .mathematics import Expression, MathVerify
from .number import Number
from .reading import Contains, EditSimilarity, Exact
from .repetition import Repetition
from .reward_model import RewardModel
from .rubric import Rubric, Score, Weighted, summarise
from .verdict import VarietyJudge
from .verifier import Verifier
from .win_rate import WinRate

__all__ = [
    "Answered",
    "BoxMatching",
    "BoxOverlap",
    "BoxedOnce",
    "Calibration",
    "Choice",
    "Citations",
    "Click",
    "Contains",
    "EachAnswer",
    "EditSimilarity",
    "EuclideanPoint",
    "Exact",
    "Expression",
    "GaussianPoint",
    "GenRM",
    "LanguageConsistency",
    "MathVerify",
    "Number",
    "Pattern",
    "PointMatching",
    "Repetition",
    "Reward",
    "RewardModel",
    "Rubric",
    "Score",
    "SoftOverlong",
    "ThinkOnce",
    "VarietyJudge",
    "Verifier",
    "Weighted",
    "WinRate",
    "summarise",
]
