"""TRL's supervised fine-tuning, by forward passes alone: :class:`ZOSFTTrainer`."""

from trl.trainer.sft_trainer import SFTTrainer  # pyright: ignore[reportMissingImports] - an extra

from l2l.integrations.trainer import ZOTrainerMixin


class ZOSFTTrainer(ZOTrainerMixin, SFTTrainer):
    """TRL's ``SFTTrainer`` with zeroth-order steps: chat templates, packing, completion-only losses and PEFT are TRL's.

    It takes what ``SFTTrainer`` takes, and ``zo``: see :class:`l2l.integrations.trainer.ZOTrainerMixin`. TRL's own metrics
    (``entropy``, ``mean_token_accuracy``) are averages over the evaluations of the steps, which are made at perturbed weights;
    ``num_tokens`` counts the tokens of every evaluation.
    """

    def _send_telemetry(self) -> None:
        """TRL reports each trainer that is made to its hub; l2l asks for no network unless it is told to."""
