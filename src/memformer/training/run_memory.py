"""The memory of a run's model on its held-out data, for the page of the run."""

from collections.abc import Iterator

from memformer.errors import InputError
from memformer.evaluation.inspection import check_can_inspect
from memformer.evaluation.kept_shares import KeptShares, read_kept_shares
from memformer.evaluation.streams import read_documents
from memformer.models import LanguageModel
from memformer.models.recurrence import RecurrentModel
from memformer.rollout import Rollout
from memformer.training.run_data import DocumentData, RecallData, RunData, first_documents
from memformer.utils.words import with_article

MAX_TIMESTEPS = 48


def read_memory(model: LanguageModel, data: RunData) -> KeptShares:
    """Return what each slot keeps of itself during the first timesteps of held-out documents, or of an episode.

    Args:
        model: The run's model.
        data: The run's data.

    Raises:
        InputError: The model has no slots, or the data is neither documents nor a recall task.
    """
    stream, description = _held_out(check_can_inspect(model), data)
    return read_kept_shares(model, stream, max_timesteps=MAX_TIMESTEPS, description=description)


def _held_out(model: RecurrentModel, data: RunData) -> tuple[Iterator[Rollout], str]:
    if isinstance(data, DocumentData):
        chosen = first_documents(data.test, MAX_TIMESTEPS * model.segment_length)
        stream = read_documents(chosen, segment_length=model.segment_length, bos_token_id=model.bos_token_id)
        return stream, "the held-out documents"
    if isinstance(data, RecallData):
        episode = data.held_out_episode(model, max_timesteps=MAX_TIMESTEPS)
        return iter([episode]), f"an episode of the recall task {data.config.task!r}"
    raise InputError(f"the data is {with_article(type(data).__name__)}; only documents and recall tasks can be read")
