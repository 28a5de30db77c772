"""A run whose length is given in epochs, in steps: known once its samples are counted."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

from mst_ds.data import TrainingData
from mst_ds.engine.deepspeed_config import require_accepted
from mst_ds.engine.resume import require_not_beyond
from mst_ds.engine.run import Run
from mst_ds.zero import fill_steps


def with_steps_of_epochs(run: Run, data: TrainingData) -> Run:
    """The run with `max_steps`, and with the schedule of so many, in place of `num_train_epochs`.

    Every rank counts the same samples, and so the same steps. The last step goes on into the next epoch where the
    samples do not fill it.

    Raises:
        ValueError: the warm-up is longer, the checkpoint is of a later step, or there are too many steps.
    """
    config = run.config
    if config.num_train_epochs is None:
        return run
    # The number as it was written: in binary 2.2 epochs of 45 samples are a little more than 99.
    samples = Fraction(str(config.num_train_epochs)) * len(data.train)
    settled = config.changed(max_steps=math.ceil(samples / run.plan.samples_per_step), num_train_epochs=None)
    settled.validate()
    require_not_beyond(settled, run.checkpoint)
    ds_config = fill_steps(run.ds_config, settled)
    require_accepted(ds_config, run.request.work.zero)
    return replace(run, config=settled, ds_config=ds_config)
