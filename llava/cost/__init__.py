"""What a model costs: FLOPs, bytes and the least time on a device. All formulas of cost are here."""

from llava.cost.question import QuestionCost, Scenario, flops_per_question, question_cost
from llava.cost.sizes import open_model
from llava.cost.training import TrainingRun, gpu_hours, training_cost

__all__ = [
    "QuestionCost",
    "Scenario",
    "TrainingRun",
    "flops_per_question",
    "gpu_hours",
    "open_model",
    "question_cost",
    "training_cost",
]
