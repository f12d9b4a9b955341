"""Tasks by name, and their options."""

import subprocess
import sys

import pytest

from effnet_quant.errors import UserError
from effnet_quant.tasks import TASKS, get_task
from effnet_quant.tasks.classification import CLASSIFICATION, Classification
from effnet_quant.tasks.task import Score
from effnet_quant.training.config import TrainConfig


def test_tasks_are_found_by_the_name_they_have() -> None:
    assert get_task("classification") is CLASSIFICATION
    assert [get_task(name).name for name in TASKS] == list(TASKS)
    with pytest.raises(UserError, match="there is no task 'chess'; choose one of: classification"):
        get_task("chess")


def test_their_names_are_known_without_torch() -> None:
    code = "from effnet_quant.tasks import TASKS; import sys; print(*TASKS, 'torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == [*TASKS, "False"]


def test_options_come_from_a_configuration() -> None:
    config = TrainConfig(label_smoothing=0.1, mixup=0.2, topk=3)
    assert CLASSIFICATION.configured(config) == Classification(label_smoothing=0.1, mixup=0.2, cutmix=0.0, topk=3)
    assert Classification(topk=2).configured(object()) == Classification(topk=2)


def test_where_lower_is_better_the_lower_score_ranks_higher() -> None:
    error_rate = Score("wer", "word error rate", "%", higher_is_better=False)
    assert error_rate.ranked(5.0) > error_rate.ranked(7.0)
    assert CLASSIFICATION.score.ranked(7.0) == 7.0
