# shellcheck shell=bash
# Sourced by the scripts beside it: the options they share, and how they talk to Google Cloud.
# All scripts take the same options and ignore those they do not need, so that one line of options serves them all.

set -euo pipefail

OPTIONS='Options, the same for every script:
  --name NAME         name of the queued resource and of its TPU (needed)
  --zone ZONE         for example us-east5-a (needed)
  --project PROJECT   default: the project that gcloud is set to
  --type TYPE         accelerator type, for example v5p-64, v6e-16, v5e-16 (needed to create)
  --runtime VERSION   TPU software version; default: the one Google names for the type
  --spot              a spot TPU: cheap, and may be taken away at any time
  --setup COMMAND     runs on every host before the installation, for example to mount a shared disk
  --repository URL    clone the code from here (at --revision); default: copy the files that git knows here
  --revision NAME     branch, tag or commit of --repository; default: its default branch
  --worker N          host to watch; default: 0
  --dry-run           print the commands, run nothing
  --help              this text'

# shellcheck disable=SC2034  # used by the scripts that source this
NAME='' ZONE='' PROJECT='' TYPE='' RUNTIME='' SPOT='' SETUP='' REPOSITORY='' REVISION='' WORKER=0 DRY_RUN=''
REST=() # what is no option: the config file and its overrides

fail() {
  echo "$(basename "$0"): $1" >&2
  exit 2
}

# The comment at the top of the script that was called, then the shared options.
help() {
  awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"
  printf '\n%s\n' "$OPTIONS"
}

# shellcheck disable=SC2034
parse_options() {
  while (($#)); do
    case $1 in
      --name | --zone | --project | --type | --runtime | --setup | --repository | --revision | --worker)
        (($# >= 2)) || fail "$1 needs a value"
        printf -v "$(tr '[:lower:]' '[:upper:]' <<<"${1#--}")" '%s' "$2"
        shift 2
        ;;
      --spot) SPOT=yes && shift ;;
      --dry-run) DRY_RUN=yes && shift ;;
      --help) help && exit 0 ;;
      --*) fail "unknown option $1; --help lists them" ;;
      *) REST+=("$1") && shift ;;
    esac
  done
  [[ -n $NAME ]] || fail '--name is needed'
  [[ -n $ZONE ]] || fail '--zone is needed'
  TYPE=$(cloud_type "$TYPE")
  WHERE=(--zone "$ZONE" ${PROJECT:+--project "$PROJECT"})
}

# The name that the cloud has for an accelerator type: its v5e-16 is v5litepod-16.
cloud_type() {
  local type
  type=$(tr '[:upper:]' '[:lower:]' <<<"$1")
  case $type in
    v5e-* | v5lite-*) echo "v5litepod-${type#*-}" ;;
    *) echo "$type" ;;
  esac
}

# The words of a command, quoted so that the line can be pasted into a shell. (Without ${word@Q}, for the bash 3.2 of
# macOS.)
quoted() {
  local word line='' quote="'" escaped="'\\''"
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]] || word=$quote${word//$quote/$escaped}$quote
    line+="$word "
  done
  echo "${line% }"
}

# Runs a command, or prints it in a dry run.
run() {
  if [[ -n $DRY_RUN ]]; then quoted "$@"; else "$@"; fi
}

# Runs a shell command on the hosts that $1 names: a number, or all.
on_workers() {
  run gcloud compute tpus tpu-vm ssh "$NAME" "${WHERE[@]}" --worker "$1" --command "$2"
}

# State of the queued resource (ACTIVE, SUSPENDED, ...), or GONE. Fails where gcloud cannot tell.
state() {
  local answer
  if answer=$(gcloud compute tpus queued-resources describe "$NAME" "${WHERE[@]}" --format 'value(state.state)' 2>&1); then
    echo "$answer"
  elif [[ $answer == *NOT_FOUND* ]]; then
    echo GONE
  else
    echo "$answer" >&2
    return 1
  fi
}
