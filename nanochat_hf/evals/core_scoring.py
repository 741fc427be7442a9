"""CORE in batches: tokens that the options of an item share run once, and only the logits that are read exist."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nanochat_hf.machine.accelerator import Ranks

from .bpb import CHUNK, beginning, encode_texts
from .core import CoreResult, CoreTask, Item, centred, prompts, spans
from .core import common_length as shared_beginning
from .scoring import Scorer

GROUP = 512  # items whose texts are tokenised at a time


@dataclass(frozen=True)
class CoreOptions:
    """How to measure CORE: at most `limit` items a task, `batch_tokens` positions a forward pass, a progress bar."""

    limit: int | None = None
    batch_tokens: int = 8192
    progress: bool = True


class Packed:
    """One row of a batch: the common beginning of some texts of an item, then the rest of each text.

    `item` is the item's number, `options` says which of its options the texts are. `reads` holds, for each text, the
    places in the row whose states predict its scored tokens; `targets` holds those tokens. A text's last token is not
    in the row, because nothing after it is predicted.
    """

    def __init__(self, item: int, options: Sequence[int], texts: Sequence[tuple[list[int], int]], share: bool):
        self.item, self.options = item, options
        inputs = [ids[:-1] for ids, _ in texts]
        shared = shared_beginning(inputs) if share else 0
        self.ids, self.positions, self.branch = list(inputs[0][:shared]), list(range(shared)), [0] * shared
        self.reads: list[list[int]] = []
        self.targets: list[list[int]] = []
        for number, (own, (ids, start)) in enumerate(zip(inputs, texts, strict=True), 1):
            moved = len(self.ids) - shared  # by how much this text's own tokens are moved in the row
            self.reads.append([p if p < shared else p + moved for p in range(start - 1, len(own))])
            self.targets.append(ids[start:])
            self.ids += own[shared:]
            self.positions += range(shared, len(own))
            self.branch += [number] * (len(own) - shared)
        self.forks = shared > 0 and len(self.ids) > shared  # options of one token add nothing to the beginning

    def __len__(self) -> int:
        return len(self.ids)


def pack(
    task: CoreTask,
    items: Sequence[Item],
    indices: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    positions: int | None,
    share: bool,
) -> list[Packed]:
    """Make the rows for the items with these numbers; an item's options share a row if `share`, and if it saves work.

    `positions`: the most tokens that the model takes.
    """
    texts = [prompts(task, items, i) for i in indices]
    encoded = iter(encode_texts(tokenizer, [text for options in texts for text in options]))
    start, rows = beginning(tokenizer), []
    for index, options in zip(indices, texts, strict=True):
        scored = spans(task, [start + next(encoded) for _ in options], positions)
        together = share and len(scored) > 1 and shared_beginning([ids for ids, _ in scored]) > 1
        if together:
            rows.append(Packed(index, range(len(scored)), scored, True))
        else:
            rows += [Packed(index, [n], [one], False) for n, one in enumerate(scored)]
    return rows


def _batches(rows: Sequence[Packed], batch_tokens: int) -> Iterator[tuple[bool, list[Packed]]]:
    # Rows of like length share a batch; rows with and without branches do not. The longest rows come first, so that
    # memory runs out at once or never.
    for shared in (True, False):
        left = sorted((row for row in rows if row.forks is shared), key=len)
        while left:
            yield shared, [left.pop() for _ in range(min(len(left), max(1, batch_tokens // len(left[-1]))))]


def _padded(lists: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    # (B, T), filled up on the right with −1
    longest = max(map(len, lists))
    return torch.tensor([[*one, *[-1] * (longest - len(one))] for one in lists], device=device)


@torch.no_grad()  # not inference_mode, which XLA tensors refuse
def _score(scorer: Scorer, rows: Sequence[Packed], shared: bool) -> list[tuple[float, bool]]:
    # for each text of the rows: the mean loss of its scored tokens, and whether each of them is the likeliest
    device = scorer.model.device
    ids = _padded([row.ids for row in rows], device).clamp(min=0)
    if shared:
        states = scorer.tree_states(
            ids,
            _padded([row.positions for row in rows], device).clamp(min=0),
            _padded([row.branch for row in rows], device),
        )
    else:
        states = scorer.states(ids)  # padded on the right, where causal attention does not look
    width = ids.shape[1]
    places = torch.tensor(
        [r * width + p for r, row in enumerate(rows) for reads in row.reads for p in reads], device=device
    )
    targets = torch.tensor([t for row in rows for targets in row.targets for t in targets], device=device)
    nll, best = [], []
    for place, target in zip(places.split(CHUNK), targets.split(CHUNK), strict=True):
        logits = scorer.logits(states.flatten(0, 1)[place])  # (n, V)
        nll.append(F.cross_entropy(logits, target, reduction="none"))
        best.append(logits.argmax(-1) == target)
    counts = [len(t) for row in rows for t in row.targets]
    pairs = zip(torch.cat(nll).cpu().split(counts), torch.cat(best).cpu().split(counts), strict=True)
    return [(loss.mean().item(), bool(hit.all())) for loss, hit in pairs]


def evaluate_core_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: CoreTask,
    *,
    options: CoreOptions | None = None,
    ranks: Ranks | None = None,
    scorer: Scorer | None = None,
) -> torch.Tensor:
    """Which of the task's items the model gets right: float tensor (items,) of 1 and 0.

    Items of other ranks are 0, so the sum over the ranks is the whole. Raises ValueError if items are too few for the
    examples before each.
    """
    options, ranks, scorer = options or CoreOptions(), ranks or Ranks(), scorer or Scorer(model)
    items = task.chosen(options.limit)
    share = task.kind != "language_modeling" and scorer.can_share()
    positions = getattr(scorer.config, "max_position_embeddings", None)
    right, mine = torch.zeros(len(items)), range(len(items))[ranks.rank :: ranks.world_size]
    with tqdm(total=len(mine), desc=task.label, unit="item", disable=not options.progress, leave=False) as bar:
        for first in range(0, len(mine), GROUP):
            part = mine[first : first + GROUP]
            scores: dict[int, dict[int, tuple[float, bool]]] = {i: {} for i in part}
            for shared, rows in _batches(pack(task, items, part, tokenizer, positions, share), options.batch_tokens):
                found = iter(_score(scorer, rows, shared))
                for row in rows:
                    scores[row.item] |= {option: next(found) for option in row.options}
            for i, scored in scores.items():
                right[i] = _is_right(task, items[i], scored)
            bar.update(len(part))
    return right


def _is_right(task: CoreTask, item: Item, scored: dict[int, tuple[float, bool]]) -> bool:
    # scored: of each option, the mean loss of its tokens and whether each of them is the likeliest
    if task.kind == "language_modeling":
        return scored[0][1]
    return min(scored, key=lambda n: (scored[n][0], n)) == item["gold"]  # of equal losses the first


def evaluate_core(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[CoreTask],
    missing: Sequence[str] = (),
    *,
    options: CoreOptions | None = None,
    ranks: Ranks | None = None,
) -> CoreResult:
    """Evaluate all tasks. Each rank takes its share of the items, and `ranks.reduce` sums the results.

    `missing` are the labels of tasks without data. With weights that FSDP2 has split, every forward pass needs all
    ranks; then each rank evaluates all items.
    """
    if not tasks:
        raise ValueError("CORE: no task has a data file; nothing could be evaluated")
    scorer, rows, ranks = Scorer(model), [], ranks or Ranks()
    shares = not scorer.sharded and ranks.reduce is not None
    for task in tasks:
        own = ranks if shares else Ranks()
        right = evaluate_core_task(model, tokenizer, task, options=options, ranks=own, scorer=scorer)
        accuracy = (own.reduce(right) if own.reduce else right).mean().item()
        rows.append(
            {
                "task": task.label,
                "kind": task.kind,
                "shots": task.num_fewshot,
                "items": len(right),
                "accuracy": accuracy,
                "baseline": task.baseline,
                "centred": centred(accuracy, task.baseline),
            }
        )
    return CoreResult(rows, list(missing))
