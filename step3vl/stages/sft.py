"""Supervised fine-tuning: conversations in a chat template, loss on assistant turns only (STEP3-VL: two stages)."""

from __future__ import annotations

from .pretrain import PretrainStage


class SFTStage(PretrainStage):
    """Next-token prediction on packed conversations; takes the arguments of `PretrainStage`.

    What differs is given from outside: the processor's template marks system, user and assistant turns
    (`processor/step3vl_chat.yaml`), the data mix text and multimodal conversations, `data.loss_weight` says what a
    token counts (token, sample, sqrt), and `init_from` names the stage before. Labels are the assistant's words
    and the token that ends each of its turns; thinking and non-thinking answers are learnt as they stand.
    """

    def setup(self, stage: str) -> None:
        """Raises ValueError for the `plain` template, in which turns cannot be told apart."""
        if self.processor.template.name == "plain":
            raise ValueError(
                "model.processor.template is 'plain', which does not mark who speaks; SFT needs 'chat' or the path "
                "of a .jinja file"
            )
