"""What every stage costs at the sizes of Gemma 2 2B, 9B and 27B: operations, bytes and memory, computed from the shapes.

    python benchmarks/arithmetic.py      # prints the tables of docs/scaling.md

Nothing here is measured. The tests compare the formulas with what torch counts: parameters with transformers' models,
operations with ``FlopCounterMode``, memory and bytes with tensors watched while tiny models run.

A multiplication and an addition are two operations. GB is 10^9 bytes, GiB 2^30. Weights, activations and logits are bfloat16
(2 bytes), deltas and SAEs float32 (4 bytes), attention is eager: Gemma 2 needs its soft cap.

Legend: L layers, d hidden size, m MLP intermediate size, V vocabulary, F SAE width, E edited layers, k neurons of one, T tokens of
a row, n tokens of a batch, N supervised places, f share of layers below the first edited one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

T, ANSWER = 160, 12  # tokens of a prompt with its answer, and of the answer alone
BATCH = 1024  # tokens of a tuning batch
READ = 2048  # tokens of a batch that is only read
D_SAE = 16_384
SHARE = 0.03  # of the indices of an edited layer
CHUNK = 256  # places whose logits exist at one time
EXAMPLES = 1000  # answers that a probe learns from
CARDS = (24, 48, 80)  # GiB
A100_FLOPS, A100_BYTES = 312e12, 2.039e12  # a second, by the data sheet of the SXM card with 80 GB
USABLE = 0.9  # of a card: the rest is left to the CUDA context and to fragmentation

# Bytes that the logits of one place hold at the worst moment, and that are read and written on the way, for each entry of the
# vocabulary; operation by operation, as PyTorch runs them unfused.
LOGITS_HELD = {"as written": 16, "where needed": 36, "ours": 20}
LOGITS_MOVED = {"where needed": 222, "ours": 360}

Way = Literal["as written", "where needed", "first epoch", "cached", "recomputed"]
WAYS: dict[Way, tuple[str, str]] = {
    "as written": ("masked matrices, second model, all logits", "4"),
    "where needed": ("the same, logits where needed", "4"),
    "first epoch": ("bad-neurons, first epoch", "3 - 2f"),
    "cached": ("bad-neurons, clean pass cached", "2 (1 - f)"),
    "recomputed": ("the same with `checkpointing`", "3 (1 - f)"),
}
MASKED: tuple[Way, ...] = ("as written", "where needed")


class Shape(NamedTuple):
    """Sizes of a Gemma 2 and the layers that are read and edited."""

    name: str
    L: int
    d: int
    m: int
    heads: int
    kv: int
    head_dim: int
    V: int
    edited: tuple[int, ...]

    @property
    def attention(self) -> int:
        """Entries of the four attention matrices of a layer."""
        return 2 * self.d * self.head_dim * (self.heads + self.kv)

    @property
    def mlp(self) -> int:
        """Entries of the three MLP matrices of a layer."""
        return 3 * self.d * self.m

    @property
    def parameters(self) -> int:
        """All parameters; the head is the embedding."""
        return self.V * self.d + self.L * (self.attention + self.mlp + 4 * self.d) + self.d

    @property
    def weights(self) -> int:
        """Bytes of the weights."""
        return 2 * self.parameters

    @property
    def first(self) -> int:
        """The first edited layer."""
        return self.edited[0]

    @property
    def f(self) -> float:
        """Share of layers below it."""
        return self.first / self.L

    @property
    def k(self) -> int:
        """Chosen indices of an edited layer."""
        return round(SHARE * self.d)

    @property
    def trained(self) -> int:
        """Values that learn: the chosen columns of gate and up, and rows of down."""
        return len(self.edited) * 3 * self.m * self.k

    @property
    def masked(self) -> int:
        """Entries of the full matrices that hold them."""
        return len(self.edited) * self.mlp


SHAPES = (
    Shape("2B", 26, 2304, 9216, 8, 4, 256, 256_000, (5, 6, 7, 8, 11, 13, 15, 19, 24)),
    Shape("9B", 42, 3584, 14_336, 16, 8, 256, 256_000, (8, 10, 12, 14, 17, 20, 23, 28, 34)),
    Shape("27B", 46, 4608, 36_864, 32, 16, 128, 256_000, (9, 11, 13, 15, 19, 22, 25, 31, 42)),
)


# Operations


def layer_flops(s: Shape, row: int = T) -> int:
    """Of one token through one layer of rows of ``row`` tokens; eager attention computes the masked half as well."""
    return 2 * (s.attention + s.mlp) + 4 * row * s.heads * s.head_dim


def head_flops(s: Shape) -> int:
    """Of one product with the head, at one place."""
    return 2 * s.V * s.d


def pass_flops(s: Shape, first: int, n: int, places: int, row: int = T) -> int:
    """Of ``n`` tokens from layer ``first`` to the end; the last layer's MLP runs at ``places`` alone."""
    return n * (s.L - first) * layer_flops(s, row) - (n - places) * 2 * s.mlp


def backward_flops(s: Shape, n: int, places: int, row: int = T) -> int:
    """Back to the first edited layer, weights frozen; there only ``down_proj`` passes a gradient on."""
    whole = 2 * (s.attention + s.mlp) + 8 * row * s.heads * s.head_dim  # both factors of the attention's products get one
    return n * ((s.L - s.first - 1) * whole + 2 * s.d * s.m) - (n - places) * 2 * s.mlp


def delta_flops(s: Shape) -> tuple[int, int]:
    """Of one token: what the deltas add to the forward pass and to the backward pass (gradients of deltas and of their inputs)."""
    E, one = len(s.edited), 2 * s.m * s.k
    return 3 * E * one, 3 * E * one + E * one + (E - 1) * 2 * one


def step_flops(s: Shape, way: Way, n: int, places: int, row: int = T) -> int:
    """Of one tuning step over ``n`` tokens in rows of ``row`` with ``places`` supervised places."""
    if way in MASKED:
        matrices = len(s.edited) * 2 * s.mlp  # their gradients
        body = 2 * pass_flops(s, 0, n, n, row) + backward_flops(s, n, n, row) + n * matrices
        return body + 3 * head_flops(s) * (n if way == "as written" else places)
    last = n if way == "recomputed" else places  # a layer that runs again in the backward pass runs whole
    forward, backward = delta_flops(s)
    tuned = pass_flops(s, s.first, n, last, row) + n * forward
    clean = pass_flops(s, 0, n, last, row) if way == "first epoch" else 0
    again = tuned if way == "recomputed" else 0
    return clean + tuned + again + backward_flops(s, n, last, row) + n * backward + 3 * head_flops(s) * places


def evaluation_flops(s: Shape, prompt: int, answer: int, answers: int) -> int:
    """Of scoring ``answers`` to one prompt before and after: prompt and lower layers once, nothing behind an answer's last token."""
    n, places = prompt + answers * (answer - 1), 1 + answers * (answer - 1)
    below = s.first * n * layer_flops(s, n)
    return below + 2 * (pass_flops(s, s.first, n, places, n) + n * delta_flops(s)[0] // 2 + head_flops(s) * places)


def sae_fit_flops(d: int, d_sae: int) -> int:
    """Of one token through a training step of one SAE: two products forward, four back (the bias taken off the input learns, too)."""
    return 6 * 2 * d * d_sae


# Memory


def saved_bytes(s: Shape, way: Way, n: int, places: int, row: int = T) -> int:
    """Bytes of activations that a tuning step keeps for the backward pass, the head apart."""
    norm = 4 * s.d + 4  # the input in float32, and its inverse root mean square
    mlp = 6 * s.m  # gate before and behind the activation, up
    attention = norm + 6 * s.heads * s.head_dim + 8 * row * s.heads  # q, k, v; the weights three times, one of them float32
    layer = attention + mlp + 3 * norm
    edited = 2 * s.m + (2 * s.d if way in MASKED else 6 * s.k)  # the product, and what the changed matrices read
    if way == "recomputed":  # inputs of the layers, and all of the one that runs again
        return n * ((s.L - s.first) * 2 * s.d + layer + edited) + places * norm
    behind = n if way in MASKED else places  # where the last layer runs behind its attention, and the final norm
    first, last = mlp + norm, n * attention + behind * (mlp + 4 * norm)
    return n * (first + (s.L - s.first - 2) * layer + len(s.edited) * edited) + last


def passing_bytes(s: Shape, n: int) -> int:
    """Bytes beside those: the embedded tokens, the first edited layer's input, what comes out of the cache, and a layer's output."""
    return 4 * 2 * s.d * n


def fixed_bytes(s: Shape, way: Way) -> int:
    """Bytes that a tuning step needs whatever the batch: weights, what learns with its gradient and AdamW, logits of a chunk."""
    if way in MASKED:
        return 2 * s.weights + masked_bytes(s)
    return s.weights + delta_bytes(s) + 2 * s.trained + LOGITS_HELD["ours"] * CHUNK * s.V  # 2: the deltas in bfloat16


def masked_bytes(s: Shape) -> int:
    """Gradients and AdamW's two moments of the full matrices, bfloat16."""
    return 3 * 2 * s.masked


def delta_bytes(s: Shape) -> int:
    """Deltas, gradients and AdamW's two moments, float32."""
    return 4 * 4 * s.trained


def tokens_that_fit(s: Shape, way: Way, card: int) -> int:
    """Tokens of a tuning batch on a card of ``card`` GiB; below 0 where not even the fixed part fits."""
    logits = {"as written": LOGITS_HELD["as written"] * T, "where needed": LOGITS_HELD["where needed"] * ANSWER}.get(way, 0) * s.V
    of_a_row = saved_bytes(s, way, T, ANSWER) + passing_bytes(s, T) + logits
    return int((USABLE * card * 2**30 - fixed_bytes(s, way)) / of_a_row * T)


def cache_bytes(s: Shape, tokens: float, places: float) -> float:
    """Bytes of kept clean passes: one hidden state a token and one a supervised place."""
    return 2 * s.d * (tokens + places)


def kept_share(ranks: int, epoch: int) -> float:
    """Share of its batches that a rank finds in its own memory in ``epoch`` (from 1), each epoch dealing the batches anew."""
    return 1 - (1 - 1 / ranks) ** (epoch - 1)


def all_reduce_bytes(size: int, ranks: int) -> float:
    """Bytes that each rank sends to sum ``size`` bytes in a ring."""
    return 2 * (ranks - 1) / ranks * size


# Operations for each byte that passes through the device's memory


def layer_intensity(s: Shape, n: int) -> float:
    """Of the matrix products of a layer over ``n`` tokens: weights, inputs and outputs pass once each."""
    q, kv = s.heads * s.head_dim, s.kv * s.head_dim
    moved = 2 * (s.d + q) + 2 * (s.d + kv) + 3 * (s.d + s.m)
    weights = s.attention + s.mlp
    return 2 * weights * n / (2 * weights + 2 * n * moved)


def head_intensity(s: Shape, moved: float) -> float:
    """Of the three products with the head over a chunk, ``moved`` more bytes for each logit."""
    products = 3 * 2 * (s.V * s.d + CHUNK * (s.V + s.d))
    return 3 * head_flops(s) * CHUNK / (products + moved * CHUNK * s.V)


def encoder_intensity(s: Shape, places: int) -> float:
    """Of an SAE's encoder over ``places``."""
    return 2 * s.d * D_SAE * places / (4 * (s.d * D_SAE + places * (s.d + D_SAE)))


# Tables


def number(x: float) -> str:
    """Three digits that count, thousands apart."""
    return f"{float(f'{x:.3g}'):,.10g}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; all columns but the first to the right."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def by_model(first: str, rows: Sequence[tuple[str, Callable[[Shape], float | str]]]) -> str:
    """One quantity a row, one model a column."""

    def shown(value: float | str) -> str:
        return value if isinstance(value, str) else number(value)

    return markdown([first, *(f"Gemma 2 {s.name}" for s in SHAPES)], [[name, *(shown(of(s)) for s in SHAPES)] for name, of in rows])


def sizes() -> str:
    """The models."""
    return by_model(
        "model",
        [
            ("parameters, 10⁹", lambda s: s.parameters / 1e9),
            ("weights, GB", lambda s: s.weights / 1e9),
            ("one token through all layers, GFLOP", lambda s: s.L * layer_flops(s) / 1e9),
            ("one product with the head at one place, GFLOP", lambda s: head_flops(s) / 1e9),
            ("the same in forward passes of one token", lambda s: head_flops(s) / (s.L * layer_flops(s))),
            ("first edited layer, f", lambda s: f"{s.first}, {number(s.f)}"),
        ],
    )


def steps() -> str:
    """Operations of tuning, in forward passes through all layers without the head."""

    def cost(s: Shape, way: Way) -> str:
        flops = step_flops(s, way, T, ANSWER) / T
        return f"{number(flops / (s.L * layer_flops(s)))} ({number(flops / 1e9)})"

    rows = [[name, rule, *(cost(s, way) for s in SHAPES)] for way, (name, rule) in WAYS.items()]
    return markdown(["passes (PFLOP per million tokens)", "rule", *(f"Gemma 2 {s.name}" for s in SHAPES)], rows)


def learning() -> str:
    """Memory of what learns, and of what a step keeps."""
    mega, kilo = 1e6, 1e3
    return by_model(
        "memory of tuning",
        [
            ("masked: matrices that learn, 10⁶ values", lambda s: s.masked / mega),
            ("masked: their gradients and AdamW, bfloat16, GB", lambda s: masked_bytes(s) / 1e9),
            ("masked: all logits of a token, MB", lambda s: LOGITS_HELD["as written"] * s.V / mega),
            ("deltas, 10⁶ values", lambda s: s.trained / mega),
            ("deltas, gradients and AdamW, float32, GB", lambda s: delta_bytes(s) / 1e9),
            ("logits of a chunk of 256 places, GB", lambda s: LOGITS_HELD["ours"] * CHUNK * s.V / 1e9),
            ("activations kept of a token, kB", lambda s: saved_bytes(s, "cached", T, ANSWER) / T / kilo),
            ("the same with `checkpointing`, kB", lambda s: saved_bytes(s, "recomputed", T, ANSWER) / T / kilo),
        ],
    )


def cards() -> str:
    """Tokens of a tuning batch by card, where the card holds the weights at all."""
    ways: tuple[Way, ...] = ("cached", "recomputed", "where needed", "as written")

    def fits(s: Shape, way: Way, card: int) -> str:
        tokens = tokens_that_fit(s, way, card)
        return f"{tokens // 100 * 100:,}" if tokens >= BATCH else number(max(tokens, 0)) if tokens > T else "no"

    hold = [(s, card) for s in SHAPES for card in CARDS if s.weights < USABLE * card * 2**30]
    rows = [[f"{s.name}, {card} GiB", *(fits(s, way, card) for way in ways)] for s, card in hold]
    return markdown(
        ["largest batch, tokens", "bad-neurons", "with `checkpointing`", "masked, logits where needed", "masked, all logits"], rows
    )


def reading() -> str:
    """SAE training, extraction and the probe."""
    sae, E = 2 * D_SAE, len(SHAPES[0].edited)

    def last(s: Shape) -> int:
        return s.edited[-1] + 1

    def extraction(s: Shape) -> float:
        return last(s) * layer_flops(s) + E * sae * s.d * ANSWER / T

    return by_model(
        "SAE, features, probe",
        [
            ("harvest: pass to the last layer read, PFLOP per million tokens", lambda s: last(s) * layer_flops(s) / 1e9),
            ("harvest: on disk, and in memory while SAEs train, GB per million tokens", lambda s: 2 * E * s.d / 1e3),
            (
                "harvest: to disk if an A100 ran at its best, GB a second",
                lambda s: 2 * E * s.d * A100_FLOPS / (last(s) * layer_flops(s)) / 1e9,
            ),
            ("SAE fit: nine SAEs, PFLOP per million tokens", lambda s: E * sae_fit_flops(s.d, D_SAE) / 1e9),
            ("SAE fit: nine SAEs with gradients and Adam, GB", lambda s: E * 16 * (sae * s.d + D_SAE + s.d) / 1e9),
            ("extraction: pass and encoding at the answers, PFLOP per million tokens", lambda s: extraction(s) / 1e9),
            (
                "extraction: whole pass with head, encoding everywhere, the same unit",
                lambda s: (s.L * layer_flops(s) + head_flops(s) + E * sae * s.d) / 1e9,
            ),
            ("extraction: nine SAEs in memory, GB", lambda s: E * 4 * (sae * s.d + 2 * D_SAE + s.d) / 1e9),
            ("features of 1,000 answers, GB", lambda s: EXAMPLES * E * 4 * (D_SAE + s.d) / 1e9),
            ("probe: one step of L-BFGS over them, GFLOP", lambda s: 4 * EXAMPLES * E * D_SAE / 1e9),
            ("layer selection: Gram matrix of a layer, at most, GFLOP", lambda s: 2 * EXAMPLES**2 * D_SAE / 1e9),
        ],
    )


def cache() -> str:
    """The clean-pass cache."""
    per_token = 1 + ANSWER / T
    return by_model(
        "clean-pass cache",
        [
            ("GB per million tokens", lambda s: cache_bytes(s, 1e6, 1e6 * ANSWER / T) / 1e9),
            ("tokens in the default 2 GB, 10³", lambda s: 2e9 / (2 * s.d * per_token) / 1e3),
            ("to the device for a batch of 1,024 tokens, MB", lambda s: cache_bytes(s, BATCH, BATCH * ANSWER / T) / 1e6),
        ],
    )


def evaluation() -> str:
    """Before and after, two answers to a prompt."""

    def ours(s: Shape) -> float:
        return evaluation_flops(s, T - ANSWER, ANSWER, 2) / 1e9

    def theirs(s: Shape) -> float:
        return 2 * 2 * (T - 1) * (s.L * layer_flops(s, T - 1) + head_flops(s)) / 1e9

    return by_model(
        "evaluation, two answers to a prompt",
        [
            ("each request in a row of its own, all logits, twice, TFLOP", lambda s: theirs(s) / 1e3),
            ("shared prompt, shared layers, logits at answers, TFLOP", lambda s: ours(s) / 1e3),
            ("ratio", lambda s: theirs(s) / ours(s)),
        ],
    )


def ranks() -> str:
    """What several ranks send each other, and find in their caches."""
    rows = []
    for count in (2, 4, 8):
        sent = [
            f"{number(all_reduce_bytes(4 * s.trained, count) / 1e6)} / {number(all_reduce_bytes(2 * s.masked, count) / 1e6)}"
            for s in SHAPES
        ]
        kept = ", ".join(f"{100 * kept_share(count, epoch):.0f}" for epoch in (2, 3, 4))
        rows.append([str(count), *sent, kept])
    return markdown(["ranks", *(f"{s.name}: MB a step, deltas / masked" for s in SHAPES), "in the cache in epoch 2, 3, 4, %"], rows)


def intensities() -> str:
    """Operations for each byte."""
    places = READ * ANSWER // T
    return by_model(
        "FLOP for each byte of device memory",
        [
            ("layers, 2,048 tokens (harvest, extraction, evaluation)", lambda s: layer_intensity(s, READ)),
            ("layers, 1,024 tokens (tuning)", lambda s: layer_intensity(s, BATCH)),
            ("head, 256 places: the three products alone", lambda s: head_intensity(s, 0.0)),
            ("head, 256 places: with all that is done to the logits, dense", lambda s: head_intensity(s, LOGITS_MOVED["where needed"])),
            ("head, 256 places: the same, chunked", lambda s: head_intensity(s, LOGITS_MOVED["ours"])),
            ("SAE encoder, float32, 153 places", lambda s: encoder_intensity(s, places)),
            ("probe, a step over all features", lambda s: 0.5),
            ("an A100 80 GB at its best, bfloat16", lambda s: A100_FLOPS / A100_BYTES),
        ],
    )


TABLES = (sizes, intensities, steps, learning, cards, cache, reading, evaluation, ranks)


def main() -> None:
    """Print the tables."""
    sys.stdout.write("\n\n".join(table() for table in TABLES) + "\n")


if __name__ == "__main__":
    main()
