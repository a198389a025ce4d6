#!/usr/bin/env bash
# Brings a run back: makes the TPU again if it was taken away, and starts the same command, which goes on from the last
# checkpoint in run_dir. Where everything is still running, it changes nothing.
#
# Usage: resume.sh OPTIONS AND ARGUMENTS OF create.sh AND run.sh

# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse_options "$@"
here=$(dirname "${BASH_SOURCE[0]}")

if [[ -n $DRY_RUN ]]; then
  quoted gcloud compute tpus queued-resources describe "$NAME" "${WHERE[@]}" --format 'value(state.state)'
  echo '# if it says SUSPENDED or FAILED:'
  "$here/delete.sh" "$@"
  echo '# if it is not there (any more):'
  "$here/create.sh" "$@"
  echo '# in any case:'
else
  before=$(state)
  case $before in
    ACTIVE) ;;
    SUSPENDED | FAILED) "$here/delete.sh" "$@" && "$here/create.sh" "$@" ;;
    *) "$here/create.sh" "$@" ;; # not there, or waiting for its turn, which it keeps
  esac
fi
exec "$here/run.sh" "$@"
