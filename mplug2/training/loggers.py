"""Where the lines of metrics.jsonl go as well: TensorBoard if it is installed, Weights & Biases if it is asked for.

Both are optional. `Log` opens them on the main process, and closes with a warning the one that fails.
"""

import json
import os
from pathlib import Path


class TensorBoard:
    """Event files in the folder `tensorboard` of the run. Raises ImportError if TensorBoard is not installed."""

    def __init__(self, folder: Path, first_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(folder / "tensorboard", purge_step=first_step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WandB:
    """A run of Weights & Biases, in the project that the environment variable WANDB_PROJECT names.

    wandb reads its other settings from the environment as well, such as WANDB_MODE=offline. Its files are in the folder
    `wandb` of the run. `wandb_id` has the identifier with which a resumed run continues. Raises ModuleNotFoundError if
    wandb is not installed, and the errors of `wandb.init`.
    """

    def __init__(self, folder: Path, first_step: int):
        try:
            import wandb
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("WANDB_PROJECT is set, but wandb is not installed: pip install -e '.[wandb]', or "
                                      "unset WANDB_PROJECT") from error
        file = folder / "wandb_id"
        self.run = wandb.init(
            project=os.environ["WANDB_PROJECT"], name=folder.name, dir=folder, resume="allow",
            id=file.read_text().strip() if first_step and file.exists() else None,
            config=json.loads((folder / "settings.json").read_text()),
            allow_val_change=True,  # a resumed run has one more command, and may have more steps
        )
        self.run.define_metric("*", step_metric="step")  # wandb's own count would drop the steps that a run repeats
        file.write_text(self.run.id + "\n")

    def write(self, step: int, values: dict[str, float]) -> None:
        self.run.log({"step": step, **values})

    def close(self) -> None:
        self.run.finish()
