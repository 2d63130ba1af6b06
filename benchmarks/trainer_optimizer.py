"""What does a step of the optimizer take? Norm, clipping and zeroing included, against
clip_grad_norm_, torch.optim.AdamW(foreach=True) and zeroing over the same tensors. SmolLM2, rank
16, one thread.
"""

from benchmarks.comparison import in_turn, report, share
from benchmarks.peft_loop import PeftLoop
from benchmarks.workloads import ADAM, SMOLLM2, InProcess, smollm2_engine

ROUNDS = 15
STEPS = 5  # per measurement


def main() -> None:
    engine = smollm2_engine()
    run = InProcess(engine)
    loop = PeftLoop(SMOLLM2, run.specs[0], ADAM)
    loop.step_on_zero_gradient()

    def ours() -> None:
        for _ in range(STEPS):
            run.step()

    def theirs() -> None:
        for _ in range(STEPS):
            loop.step()

    times = in_turn({"ours": ours, "theirs": theirs}, ROUNDS)
    tensors = f"{len(loop.trained)} tensors, {sum(p.numel() for p in loop.trained) / 1e6:.1f} M"
    report(
        [share(f"optim_step x {STEPS}, {tensors}", times["ours"], times["theirs"], 0.3, "CPU s")]
    )


if __name__ == "__main__":
    main()
