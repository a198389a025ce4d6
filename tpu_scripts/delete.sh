#!/usr/bin/env bash
# Deletes the TPU and its request. What is on the hosts' own disks is lost.
#
# Usage: delete.sh --name NAME --zone ZONE

# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse_options "$@"
run gcloud compute tpus queued-resources delete "$NAME" "${WHERE[@]}" --force --quiet
