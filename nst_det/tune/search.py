"""The search: for every method the same number of trials, each the same training on the same images."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nst_det.engine.seeds import derive_seed
from nst_det.errors import UserError
from nst_det.tune.config import Space

if TYPE_CHECKING:
    from optuna import Study
    from optuna.samplers import BaseSampler

log = logging.getLogger(__name__)
STORAGE_FILE = "optuna.db"
BY_SEED = "by_seed"
# (trial's number, method -> settings) to (method -> seed -> value, larger is better)
Evaluate = Callable[[int, Mapping[str, dict[str, Any]]], Mapping[str, Mapping[int, float]]]


@dataclass(frozen=True)
class Best:
    """What was found for a method.

    Attributes:
        settings: keys of the TRANSFER node.
        value: mean over the seeds of what the method is judged by, 0..1, larger is better.
        default: the same of the configured setting, which is the first trial.
        trials: settings tried.
        by_seed: ``value`` of each seed.
    """

    settings: dict[str, Any]
    value: float
    default: float
    trials: int
    by_seed: dict[str, float]


def search(folder: Path, spaces: Mapping[str, Space], trials: int, seed: int, evaluate: Evaluate) -> dict[str, Best]:
    """Find each method's best setting on equal terms; goes on where it was stopped.

    All methods that have as many finished trials are evaluated together, since stage one trains them side by side.
    A trial that was stopped is asked for again under the same seed and the same history, and so is the same one.

    Args:
        folder: holds Optuna's storage.
        spaces: what is searched, by method.
        trials: for each method; those finished already count.
        seed: of the sampler.
        evaluate: trains and judges one setting of each of some methods.

    Returns:
        The best setting by method; of equal ones the earliest.

    Raises:
        UserError: Optuna is not installed, or its storage is damaged.
    """
    require_optuna()
    studies = _studies(folder / STORAGE_FILE, spaces)
    while True:
        counts = {word: len(_finished(study)) for word, study in studies.items()}
        number = min(counts.values())
        if number >= trials:
            break
        due = [word for word, count in counts.items() if count == number]
        asked = {word: _ask(studies[word], spaces[word], _sampler(seed, word, number, trials)) for word in due}
        settings = {word: spaces[word].settings(trial.params) for word, trial in asked.items()}
        log.info("trial %d of %d: %s", number + 1, trials, ", ".join(due))
        values = evaluate(number, settings)
        for word, trial in asked.items():
            trial.set_user_attr(BY_SEED, {str(key): value for key, value in values[word].items()})
            studies[word].tell(trial, statistics.fmean(values[word].values()))
    return {word: _best(study, spaces[word], trials) for word, study in studies.items()}


def require_optuna() -> None:
    """Say at once what is missing.

    Raises:
        UserError: Optuna is not installed.
    """
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise UserError("nst-det tune needs Optuna; install it with: pip install 'nst_det[tune]'") from error


def _studies(path: Path, spaces: Mapping[str, Space]) -> dict[str, Study]:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        storage = optuna.storages.RDBStorage(f"sqlite:///{path}")
        return {
            word: optuna.create_study(storage=storage, study_name=word, direction="maximize", load_if_exists=True)
            for word in spaces
        }
    except Exception as error:
        # SQLAlchemy and alembic each have errors of their own for a file that is no database
        raise UserError(f"{path}: can't be used ({str(error).splitlines()[0]}); remove it to begin again") from error


def _sampler(seed: int, word: str, number: int, trials: int) -> BaseSampler:
    """Tree-structured Parzen estimator, after a third of the trials at random; a seed of its own for each trial."""
    from optuna.samplers import TPESampler

    return TPESampler(
        n_startup_trials=max(2, trials // 3),
        multivariate=True,
        seed=derive_seed(seed, "tune", word, number) % 2**32,
    )


def _ask(study: Study, space: Space, sampler: BaseSampler) -> Any:
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
    from optuna.trial import TrialState

    for left in study.get_trials(deepcopy=False, states=(TrialState.RUNNING, TrialState.WAITING)):
        # of a call that was stopped
        study.tell(left.number, state=TrialState.FAIL)
    if not _finished(study):
        study.enqueue_trial(dict(space.default))
    study.sampler = sampler
    distributions: dict[str, BaseDistribution] = {
        name: FloatDistribution(low, high, log=True) for name, (low, high) in space.weights.items()
    }
    distributions |= {name: CategoricalDistribution(values) for name, values in space.choices.items()}
    return study.ask(distributions)


def _finished(study: Study) -> list[Any]:
    from optuna.trial import TrialState

    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def _best(study: Study, space: Space, trials: int) -> Best:
    # a former call may have been given more
    finished = _finished(study)[:trials]
    best = max(finished, key=lambda trial: (trial.value, -trial.number))
    return Best(
        settings=space.settings(best.params),
        value=float(best.value),
        default=float(finished[0].value),
        trials=len(finished),
        by_seed=dict(best.user_attrs[BY_SEED]),
    )
