"""What a user watches a run with: TensorBoard's pages and pictures, CSV files, Weights & Biases."""

from adamoe_dist.monitoring.event_lists import CsvWriter, WandbWriter, check_wandb
from adamoe_dist.monitoring.heat_map import HeatMap
from adamoe_dist.monitoring.hyperparameters import hyperparameters
from adamoe_dist.monitoring.pictures import RoutingCounts
from adamoe_dist.monitoring.questions import QUESTIONS
from adamoe_dist.monitoring.tensorboard import TensorBoardWriter

__all__ = [
    "QUESTIONS",
    "CsvWriter",
    "HeatMap",
    "RoutingCounts",
    "TensorBoardWriter",
    "WandbWriter",
    "check_wandb",
    "hyperparameters",
]
