#!/usr/bin/env bash
# Requests a TPU slice and waits until it is there. Where it has been requested already, it only waits.
#
# Usage: create.sh --name NAME --zone ZONE --type TYPE [--runtime VERSION] [--spot]

# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse_options "$@"
[[ -n $TYPE ]] || fail '--type is needed'

# cloud.google.com/tpu/docs/runtimes
case $TYPE in
  v6e-*) default_runtime=v2-alpha-tpuv6e ;;
  v5p-*) default_runtime=v2-alpha-tpuv5 ;;
  v5litepod-*) default_runtime=v2-alpha-tpuv5-lite ;;
  v4-* | v3-* | v2-*) default_runtime=tpu-ubuntu2204-base ;;
  *) default_runtime='' ;;
esac
RUNTIME=${RUNTIME:-$default_runtime}
[[ -n $RUNTIME ]] || fail "no default --runtime is known for --type $TYPE; known are v6e-N, v5p-N, v5e-N (v5litepod-N), v4-N, v3-N, v2-N"

[[ -n $DRY_RUN ]] || before=$(state)
if [[ ${before:-GONE} == GONE ]]; then
  run gcloud compute tpus queued-resources create "$NAME" --node-id "$NAME" "${WHERE[@]}" \
    --accelerator-type "$TYPE" --runtime-version "$RUNTIME" ${SPOT:+--spot}
fi
[[ -z $DRY_RUN ]] || exit 0

while true; do
  now=$(state)
  case $now in
    ACTIVE) break ;;
    FAILED | SUSPENDED | GONE)
      echo "create.sh: the request failed; gcloud compute tpus queued-resources describe $NAME ${WHERE[*]} says why" >&2
      exit 1
      ;;
    *) sleep 30 ;;
  esac
done
echo "$NAME is there" >&2
