"""docs/models.md, made from the tables of families."""

from tests.families import FAMILIES
from tests.families.renderers import table

_PAGE = """\
# Base models

Made from the tables in `tests/families/` by `python -m tests.families > docs/models.md`; a test
holds it to that.

What is not here may be served as well: whatever a model is called, it is loaded if it proves to be
computed rightly, and refused by the name of its class, with what is missing, if it does not
(`mint_core/model/proof.py`); the log says then that it is not in this table. Of what is here, tiny
random models of the class pass all of this, `make models` for every row and `make test` for one of
each code path:

- trainer and sampler load it;
- logprobs, gradients of every A and B, and weights after steps equal those of PEFT and torch in
  float64;
- what shares a pass changes no bit, on a CPU;
- the sampler's logprobs equal the trainer's, and decoding from the cache, a beginning that was
  found in it, and what had to be computed again equal the whole;
- its adapters open in PEFT with the same logits, and its merged export in transformers.

Where a checkpoint reads more than text ("text alone" below), its part for text is served and the
rest is left out; `text_only` in the capabilities says so. Names of layers are those of the whole
model, so that adapters open on it, and an export is whole.

Experts stay frozen, as do routers and the gates of shared experts; what is trained beside them are
attention, what layers with a state have in its place, shared experts and dense layers. Adapters of
the last two open in no PEFT (0.21) for the families with a star: it takes `gate_proj`, `up_proj`
and `down_proj` for names that experts had before transformers fused them. Those of attention and
head do, but for its gates where there are two stars, and a merged export has everything.

Hybrids with a gated delta rule (Qwen 3.5, Qwen 3 Next) use kernels of `fla` on a GPU where it is
installed (`pip install 'mintrpc-...whl[server,fla]'`), and else our own chunks.

That what shares a pass changes no bit, each model is asked when it is loaded, and the capabilities
and the log say where it does: on a CPU neighbours share the vectors in which functions of narrow
tensors are computed. Behind linear layers rows lie apart, such as those of a gate for each head;
what a second function makes of them does not, so a Gemma 3n or MiniMax-M3 whose MLPs are no
multiple of 32 wide would say that it is not reproducible.

## Renderers

What writes conversations of a family, and the outside reference, in a public package, with which it
is compared token for token. What renderers do, and which families have no reference and use
`template`, is in `docs/renderers.md`.

| family | renderer | compared with | carried by |
|---|---|---|---|
{renderers}

## Float8 weights

With `--dtype float8` the weights of all linear layers but the head are 8-bit numbers (e4m3) with
scales; embeddings, head, norms, biases and adapters stay as they are, as does what is computed:
bfloat16 on a GPU, float32 on a CPU. The numbers are made as the model is read, weight by weight,
with a power of two as the scale of each output channel; or they lie in the checkpoint: `fp8`, with
a scale for each block or weight (DeepSeek-V3, Qwen3), and `float-quantized` of compressed-tensors,
by channel, block or weight. Other quantized checkpoints are refused by the option's name, and so
are models with experts. What a checkpoint says of activations is left out: they are never rounded.

A GPU then holds a byte a weight: by their shapes 9.4 GB of Qwen3-8B where bfloat16 takes 16.4, and
73 GB of a Llama of 70B where it takes 141. Its kernel has not run on a GPU yet. On a CPU float8 is
emulated, for tests: the same numbers, in the memory and time of float32.

Such a base has a fingerprint of its own. Adapters and training state open where the model is served
in the other kind of type only with `--adapters-across-dtypes`. An export is merged into what the
float8 weights stand for, so that it is the model that was trained; it is no float8 itself.

## The same tokens on a busy GPU

On a CPU a seed gives the same tokens and logprobs whoever else is served. On a GPU a sampler does
so with `--batch-invariant`, at a cost in speed (`benchmarks/README.md`), for models whose layers
are computed in our own forms throughout: of the dense ones below Llama, Qwen 2, 2.5 and 3, Mistral
and what is built as they are, in bfloat16, float32 and float8, with biases and windows; Gemma 2 and
3 in float32. Others are refused at start by the part that stands against it: experts, layers with
state, or a layer's own code. It has not run on a GPU yet; each start tries it.

## Served

| family | class | of its own |
|---|---|---|
{served}

## Refused

| family | class | what is missing |
|---|---|---|
{refused}
"""


def page() -> str:
    """docs/models.md."""
    rows: dict[bool, list[str]] = {True: [], False: []}
    for family in FAMILIES:
        name = family.name + family.stars
        own = family.own
        if family.served and family.since:
            own += f"; from transformers {family.since} on"
        rows[family.served].append(f"| {name} | `{family.architecture}` | {own} |")
    return _PAGE.format(
        served="\n".join(rows[True]), refused="\n".join(rows[False]), renderers=table()
    )
