#!/usr/bin/env bash
# Installs jaxlm on every host of a TPU slice and starts a training run there, detached from this terminal.
# The hosts find each other by themselves. Each writes ~/jaxlm.log; watch.sh shows it.
#
# Usage: run.sh --name NAME --zone ZONE [--setup COMMAND] [--repository URL [--revision NAME]] CONFIG [key=value ...]
#
# CONFIG is a path inside the repository, or a run directory in a bucket (gs://BUCKET/FOLDER). run_dir and data.corpus
# must be in a bucket, or on a disk that all hosts share and that outlives the TPU (see README.md): what the hosts
# write to their own disks is lost with them.

# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse_options "$@"
((${#REST[@]})) || fail 'the config file is needed, for example configs/gpt2_124m.yaml'
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[[ ! $REPOSITORY =~ ^https?://[^/]*@ ]] || fail '--repository with a password or token in it would stay on the hosts; use an SSH address, or copy'
[[ -n $REPOSITORY || ${REST[0]} == gs://* || ${REST[0]} == s3://* || -f $root/${REST[0]} ]] || fail "${REST[0]}: no such file in $root"

# The variables in these lines belong to the hosts.
# shellcheck disable=SC2016
running='[ -f ~/jaxlm.pid ] && kill -0 "$(cat ~/jaxlm.pid)" 2>/dev/null'

# 1. A run that is going on is left alone.
on_workers all "if $running; then echo 'a run is going on here already' >&2; exit 1; fi"

# 2. The code, in ~/jaxlm.
[[ -z $SETUP ]] || on_workers all "$SETUP"
if [[ -n $REPOSITORY ]]; then
  on_workers all "rm -rf ~/jaxlm && git clone $(quoted "$REPOSITORY") ~/jaxlm"
  [[ -z $REVISION ]] || on_workers all "git -C ~/jaxlm checkout $(quoted "$REVISION")"
else
  folder=${TMPDIR:-/tmp}
  # Other users of this machine must not be able to put their code in its place.
  [[ -n $DRY_RUN ]] || { folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT; }
  archive=$folder/jaxlm-$NAME.tar.gz
  run bash -c "cd $(quoted "$root") && git ls-files -z --cached --others --exclude-standard | tar --null -czf $(quoted "$archive") -T -"
  run gcloud compute tpus tpu-vm scp "$archive" "$NAME:jaxlm.tar.gz" "${WHERE[@]}" --worker all
  on_workers all 'rm -rf ~/jaxlm && mkdir ~/jaxlm && tar -C ~/jaxlm -xzf ~/jaxlm.tar.gz'
fi

# 3. The environment, in ~/venv. The hosts' own Python (3.10) is too old; uv brings a newer one.
on_workers all "python3 -m pip install --quiet --user uv"
on_workers all "cd ~ && .local/bin/uv venv --quiet --allow-existing --python 3.12 venv"
on_workers all "cd ~ && .local/bin/uv pip install --quiet --python venv/bin/python -e './jaxlm[tpu,remote]'"

# 4. The run. setsid and nohup: it outlives this connection. What crashes or hangs is started again, on all hosts.
on_workers all "cd ~/jaxlm && { setsid nohup ~/venv/bin/jaxlm train $(quoted "${REST[@]}" devices.platform=tpu --restart 10) </dev/null >>~/jaxlm.log 2>&1 & \
echo \$! >~/jaxlm.pid; }"
