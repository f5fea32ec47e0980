#!/usr/bin/env bash
# Two nodes on one machine: network namespaces with a cable between them, and examples/launch.sh in both.
#
#   ci/two_nodes.sh [together] [missing] [cut]     each a scenario; default: all
#
# together  a run of two steps over both nodes ends with status 0 on each
# missing   only the head starts: an error within the limit, listing the nodes present and the number missing
# cut       the cable is pulled in mid-run: both nodes report it and end with an error, in bounded time
#
# Needs root and iproute2. Exit status 77: this machine does not allow it; the reason is on stderr.
set -euo pipefail

launcher="$(dirname "$0")/../examples/launch.sh"
folder=$(mktemp -d /tmp/two-nodes-XXXXXX)
nodes=("rl$$a" "rl$$b") # also the names of the cable's ends, of which 15 letters count
addresses=(10.77.0.1 10.77.0.2)

main() {
    trap clean EXIT
    trap 'exit 1' INT TERM
    [ $# -gt 0 ] || set -- together missing cut
    for name in "$@"; do
        declare -F "scenario_$name" > /dev/null || { echo "two nodes: no scenario is called $name" >&2; exit 2; }
    done
    lay_cable
    for name in "$@"; do
        local began=$SECONDS
        "scenario_$name"
        within 10 nothing_left || fail "no process is left ($(nothing_left))" 0
        echo "two nodes, $name: as it should be, after $((SECONDS - began)) s"
    done
}

scenario_together() {
    launch 0 600 train.steps=2
    launch 1 600 train.steps=2
    ended 0 180 && ended 1 30
    expect 0 "status 0"
    expect 1 "status 0"
    expect 0 "2 of 2 nodes: ${addresses[0]}, ${addresses[1]}"
    [ "$(wc -l < "$folder/run/metrics.jsonl")" = 2 ] || fail "2 steps have 2 lines of metrics" 0
}

scenario_missing() {
    launch 0 5 train.steps=2
    ended 0 90
    expect 0 "status 1"
    expect 0 "1 of 2 nodes did not come within 5 s; there: ${addresses[0]}"
}

scenario_cut() {
    launch 0 600 train.steps=1000000
    launch 1 600 train.steps=1000000
    within 180 grep -qE "^(step 3/|status)" "$folder/0.log" || fail "training begins" 0
    expect 0 "step 3/"
    ip -n "${nodes[1]}" link set "${nodes[1]}" down
    ended 1 90 && ended 0 180
    expect 0 "status 1"
    expect 0 "${addresses[1]} is lost"
    expect 1 "status 1"
    expect 1 "has not answered for"
    ip -n "${nodes[1]}" link set "${nodes[1]}" up
}

# launch NODE WAIT_SECONDS OVERRIDE...: the launcher in a namespace; its output, and its status as the last line, in NODE.log
launch() {
    local node=$1 seconds=$2
    shift 2
    rm -rf "$folder/run"
    : > "$folder/$node.log" # here, not in the background: what the scenario before wrote must not be read as this one's
    (
        export NNODES=2 DEVICES_PER_NODE=1 MASTER_ADDR=${addresses[0]} WAIT_SECONDS=$seconds RAY_AUTH_TOKEN_PATH=$folder/token
        export RAY_TEMP_DIR=$folder/ray$node
        status=0
        ip netns exec "${nodes[$node]}" bash "$launcher" "$folder/run.yaml" "$@" --run-dir "$folder/run" || status=$?
        echo "status $status"
    ) > "$folder/$node.log" 2>&1 &
}

ended() { within "$2" grep -q "^status" "$folder/$1.log" || fail "node $1 ends within $2 s" "$1"; }
expect() { grep -qF "$2" "$folder/$1.log" || fail "node $1 says '$2'" "$1"; }

# Prints processes still running in the namespaces.
nothing_left() {
    local left
    left=$(for node in "${nodes[@]}"; do ip netns pids "$node"; done)
    [ -z "$left" ] || { ps -o pid=,args= -p "$(echo $left | tr ' ' ,)"; return 1; }
}

# within SECONDS COMMAND...: true as soon as the command is
within() {
    local limit=$((SECONDS + $1))
    shift
    until "$@"; do
        [ "$SECONDS" -lt "$limit" ] || return 1
        sleep 1
    done
}

fail() {
    echo "two nodes: expected that $1; node $2 said:" >&2
    tail -n 40 "$folder/$2.log" >&2
    exit 1
}

lay_cable() {
    [ "$(id -u)" = 0 ] || skip "root is needed to make network namespaces"
    command -v ip > /dev/null || skip "the ip command (iproute2) is needed to make network namespaces"
    for node in "${nodes[@]}"; do
        ip netns add "$node" 2> "$folder/why" || skip "network namespaces are not allowed here: $(cat "$folder/why")"
        ip -n "$node" link set lo up
    done
    ip link add "${nodes[0]}" netns "${nodes[0]}" type veth peer name "${nodes[1]}" netns "${nodes[1]}" 2> "$folder/why" \
        || skip "no virtual cable can be made here: $(cat "$folder/why")"
    for number in 0 1; do
        ip -n "${nodes[$number]}" addr add "${addresses[$number]}/24" dev "${nodes[$number]}"
        ip -n "${nodes[$number]}" link set "${nodes[$number]}" up
    done
    cat > "$folder/run.yaml" << 'YAML'
model: {path: tiny_llama}
data: {train: {name: arithmetic, options: {count: 64, max_value: 9}}, max_prompt_tokens: 64}
backend: {options: {threads: 1}}
rollout: {engine: torch, max_new_tokens: 6}
reward: [{name: math}]
algorithm: {group_size: 4}
train: {steps: 2, prompts_per_step: 4, max_tokens_per_microbatch: 256}
logging: {tensorboard: false, samples_on_console: 0}
YAML
}

skip() {
    echo "two nodes: $1" >&2
    exit 77
}

clean() {
    [ -z "${KEEP:-}" ] || cat "$folder"/*.log
    for node in "${nodes[@]}"; do
        ip netns pids "$node" 2> /dev/null | xargs --no-run-if-empty kill -KILL || true
        ip netns delete "$node" 2> /dev/null || true
    done
    rm -rf "$folder"
}

main "$@"
