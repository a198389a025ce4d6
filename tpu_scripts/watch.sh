#!/usr/bin/env bash
# Follows the log of a run on one host (--worker, default 0: the one that prints progress).
#
# Usage: watch.sh --name NAME --zone ZONE [--worker N]

# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse_options "$@"
on_workers "$WORKER" 'tail -n 100 -F ~/jaxlm.log'
