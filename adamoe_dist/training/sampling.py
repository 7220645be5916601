"""A short text from the model in training."""

import logging
import unicodedata

import torch

from adamoe_dist.data import Tokenizer
from adamoe_dist.training.callback import Callback, StepResult
from adamoe_dist.training.loop import Trainer
from adamoe_dist.training.recorder import Recorder

logger = logging.getLogger(__name__)
TEMPERATURE = 0.8


@torch.no_grad()
def sample_text(trainer: Trainer, tokenizer: Tokenizer, prompt: str, new_tokens: int) -> str:
    """Continue ``prompt`` by ``new_tokens`` tokens. Collective: ranks share experts, so all of them compute.

    Every rank draws the same tokens, from the same scores and a generator seeded by ``run.seed`` and the step.
    """
    trainer.engine.eval()
    generator = torch.Generator().manual_seed(trainer.config.run.seed + trainer.step)
    start = [*tokenizer.prefix_ids, *tokenizer.encode(prompt)] or [tokenizer.eod_id]
    ids = torch.tensor([start], device=trainer.device)
    for _ in range(new_tokens):
        window = ids[:, -trainer.config.model.sequence_length :]
        scores_V = trainer.schedule.next_token_scores(window, tokenizer.vocab_size).cpu()
        drawn = torch.multinomial(torch.softmax(scores_V / TEMPERATURE, dim=0), 1, generator=generator)
        ids = torch.cat([ids, drawn.to(trainer.device).view(1, 1)], dim=1)
    trainer.engine.train()
    return tokenizer.decode(ids[0].tolist())


def printable(text: str) -> str:
    """Return a text whose control characters, but for line ends and tabs, are escaped: a terminal would obey them."""
    return "".join(sign if sign in "\n\t" or unicodedata.category(sign) != "Cc" else ascii(sign)[1:-1] for sign in text)


class SampleWriter(Callback):
    """Generates a text every ``monitor.sample_interval`` steps and at the end; logs it, adds it to TensorBoard."""

    def __init__(self, tokenizer: Tokenizer, recorder: Recorder) -> None:
        self._tokenizer = tokenizer
        self._recorder = recorder

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Generate if it is due; at the last step that is left to the end."""
        interval = trainer.config.monitor.sample_interval
        if interval is not None and result.step % interval == 0 and not trainer.is_last_step:
            self._generate(trainer)

    def on_finish(self, trainer: Trainer) -> None:
        """Generate, unless a signal ended the run."""
        if trainer.config.monitor.sample_tokens and trainer.stop_signal is None:
            self._generate(trainer)

    def _generate(self, trainer: Trainer) -> None:
        monitor = trainer.config.monitor
        text = sample_text(trainer, self._tokenizer, monitor.sample_prompt, monitor.sample_tokens)
        logger.info("sample, continuing %r:\n%s", monitor.sample_prompt, printable(text))
        if self._recorder.board:
            self._recorder.board.write_text("sample", text, trainer.step)
