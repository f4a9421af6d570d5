#!/usr/bin/env bash
# run.sh docker run OPTION… -- IMAGE COMMAND…: run this command, with a mount for each path of this host that a variable of
# the pipelines names, and with a terminal if there is one. Called by `make run` and `make pipeline`.
#
# MODEL_NAME, DATASET, RECIPE and ACCELERATE_CONFIG are read-only in the container; MOUNT_DIR and runs/ are not.
set -Eeuo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

die() {
  echo "UserError: $1" >&2
  exit 2
}

options=()

# bind SOURCE TARGET [ro]: add a mount. docker's --volume separates its parts by colons, so that no path can have one
bind() {
  [[ $1 != *:* ]] || die "$1: docker cannot mount a path with a colon: rename it, or link to it from a path without"
  options+=(-v "$1:$2${3:+:$3}")
}

# mount_input NAME SOURCE TARGET: mount SOURCE below TARGET, and set the variable NAME to its path in the container
mount_input() {
  local name=$1 source=$2 target=$3 whole link
  whole=$source
  if [[ -d $source ]]; then
    if [[ $source == */snapshots/* && -d ${source%/snapshots/*}/blobs ]]; then
      whole=${source%/snapshots/*} # the Hub's cache: the snapshot's files are links into blobs/
    fi
    while IFS= read -r -d '' link; do
      [[ $(realpath "$link") == "$(realpath "$whole")"/* ]] ||
        die "$name $source: $link links to a file outside the folder, which the container would not see: copy it there"
    done < <(find "$source" -type l -print0)
  elif [[ $name == DATASET && ($source == *.yaml || $source == *.yml) ]]; then
    whole=$(dirname "$source") # a mixture names files relative to its own folder
  fi
  bind "$whole" "$target/$(basename "$whole")" ro
  printf -v "$name" %s "$target/$(basename "$whole")${source#"$whole"}"
}

# looks_like_a_path VALUE: whether a value that is no path on this host was meant as one, and not as a name on the Hub
looks_like_a_path() {
  [[ $1 == [./~]* || $1 == */*/* || $1 == */ || $1 =~ \.(jsonl|json|csv|parquet|ya?ml|txt)(\.gz)?$ ]]
}

for name in MODEL_NAME DATASET RECIPE ACCELERATE_CONFIG; do
  value=${!name:-}
  [[ -n $value ]] || continue
  if [[ -e $value ]]; then
    [[ -r $value ]] || die "$name $value: cannot be read"
    mount_input "$name" "$(realpath -s "$value" 2>/dev/null || realpath "$value")" "/mnt/$(tr 'A-Z_' 'a-z-' <<<"$name")"
  elif [[ $name == RECIPE || $name == ACCELERATE_CONFIG ]] || looks_like_a_path "$value"; then
    die "$name $value: no such file or folder on this host"
  fi
  export "${name?}"
done
if [[ -n ${MOUNT_DIR:-} ]]; then
  [[ -d $MOUNT_DIR ]] || die "MOUNT_DIR $MOUNT_DIR: no such folder on this host: make it first"
  bind "$(realpath "$MOUNT_DIR")" /mnt/mount-dir
  export MOUNT_DIR=/mnt/mount-dir
fi
if [[ -n ${OUTPUT_DIR:-} ]]; then
  output=$(realpath -m "$OUTPUT_DIR" 2>/dev/null || echo "$OUTPUT_DIR")
  [[ $output == "$PWD"/runs/* ]] || die "OUTPUT_DIR $OUTPUT_DIR: must be in runs/, the folder that the container writes to"
  export OUTPUT_DIR=/opt/tandem/${output#"$PWD/"}
fi

mkdir -p runs
# If root has made the folder for the user HOST_UID, give it to that user, who could not write to it otherwise
if [[ $(id -u) == 0 && $HOST_UID != 0 && $(stat -c %u runs) != "$HOST_UID" ]]; then
  chown "$HOST_UID:$HOST_GID" runs
fi
bind "$PWD/runs" /opt/tandem/runs
[[ ! -t 0 || ! -t 1 ]] || options+=(-t)

given=()
while [[ $1 != -- ]]; do
  given+=("$1")
  shift
done
shift
exec "${given[@]}" "${options[@]}" "$@"
