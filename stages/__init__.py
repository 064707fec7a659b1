"""One thin door for each command: parse, load the parameters, call one function, write the result."""

import os

# Threads that wait by spinning fight over shared cores: with two busy neighbours a training step took ten times as long.
# OpenMP reads this when torch is imported, so it stands here, before any door imports anything.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
