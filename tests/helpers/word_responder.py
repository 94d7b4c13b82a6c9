"""A responder without a model, for tests of runs."""

from tests.helpers.official_files import picture
from vlgpt import seeds


class WordResponder:
    """Answers with addressed random words and pictures; counts questions, can break down on purpose."""

    def __init__(self, *, breaks_after: int | None = None, identity=None):
        self.num_asked, self.num_batches, self.breaks_after = 0, 0, breaks_after
        self.identity = identity or {"kind": "words"}

    def _ask(self, prompts):
        if self.num_batches == self.breaks_after:
            raise KeyboardInterrupt
        self.num_batches += 1
        self.num_asked += len(prompts)

    def generate(self, prompts, decoding):
        self._ask(prompts)
        return [f"word{seeds.address(decoding.seed, p.id, p.document.text) % 1000}" for p in prompts]

    def rank(self, prompt, candidates, *, normalise):
        self._ask([prompt])
        return seeds.generator("rank", prompt.id, normalise).random(len(candidates))

    def draw(self, prompts, decoding):
        self._ask(prompts)
        return [None if seeds.address(p.id) % 3 == 0 else picture(seeds.address(p.id)) for p in prompts]

    reconstruct = draw
