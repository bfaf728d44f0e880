"""`fedlq run` on a cluster's head: ray submit cluster/aws.yaml cluster/run.py -- CONFIG.yaml key=value ..."""

import os
import sys

# Ray reads its environment when it is imported.
os.environ.setdefault("RAY_ADDRESS", "auto")  # the Ray that the launcher started on this machine
os.environ.setdefault("RAY_AUTH_MODE", "token")  # with the token in ~/.ray/auth_token

from fedlq_ray.cli.main import main

sys.argv.insert(1, "run")
main()
