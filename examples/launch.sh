#!/usr/bin/env bash
# Trains over the devices of one node or several. Run the same line on every node:
#
#   NNODES=2 DEVICES_PER_NODE=8 MASTER_ADDR=10.0.0.1 bash examples/launch.sh RUN.yaml [a.b=value ...] [--backend NAME]
#
# The node whose address is MASTER_ADDR is the head. It starts Ray, waits for the others, runs `rlcore grpo RUN.yaml` on the
# devices of all, and stops what it started. The others join its Ray, stay until the run ends, and leave. Every node exits with
# the trainer's status. In a Ray cluster that exists, set RAY_ADDRESS instead and run it once. More in docs/launching.md.
set -euo pipefail

# What differs from cluster to cluster: edit it here, or set it in the environment, which comes first.
export NNODES="${NNODES:-1}"                            # nodes of the run, the head included
export DEVICES_PER_NODE="${DEVICES_PER_NODE:-${NPUS_PER_NODE:-${GPUS_PER_NODE:-1}}}"
export MASTER_ADDR="${MASTER_ADDR:-}"                   # the head, on the network that the nodes share: never localhost
export CURRENT_IP="${CURRENT_IP:-}"                     # this node; when empty, the address by which it reaches the head
export WAIT_SECONDS="${WAIT_SECONDS:-600}"              # how long the head waits for the nodes, and a node for the head

export RAY_PORT="${RAY_PORT:-6766}"                     # where the head listens, the same on every node
export NODE_MANAGER_PORT="${NODE_MANAGER_PORT:-0}"      # these three on every node; 0 is any free port. Set them, and open
export OBJECT_MANAGER_PORT="${OBJECT_MANAGER_PORT:-0}"  # them, where a firewall stands between the nodes
export WORKER_PORTS="${WORKER_PORTS:-0-0}"              # LOW-HIGH
export DASHBOARD_HOST="${DASHBOARD_HOST:-127.0.0.1}"    # 0.0.0.0 shows Ray's dashboard to everyone
export DASHBOARD_PORT="${DASHBOARD_PORT:-8260}"

export JEMALLOC="${JEMALLOC:-auto}"                     # malloc of all processes: jemalloc where it is found; off; a path

# The token without which nobody enters the cluster. The head makes it if there is none; every other node needs the same, in
# this file or on standard input: launch.sh RUN.yaml --token-stdin < FILE
export RAY_AUTH_TOKEN_PATH="${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}"

python="${PYTHON:-$(dirname "$0")/../.venv/bin/python}"
command -v "$python" > /dev/null || { echo "launch.sh: there is no $python; make setup, or set PYTHON" >&2; exit 2; }
ulimit -Sn hard # Ray keeps many connections

exec "$python" -m rlcore launch "$@"
