"""Run lm-evaluation-harness with the model `memformer` by `python -m memformer.lm_eval`."""

import sys

from memformer.lm_eval.command import main

sys.exit(main(sys.argv[1:]))
