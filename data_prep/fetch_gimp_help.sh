#!/bin/sh
# Unpack the English GIMP manual (Debian package gimp-help-en, GFDL) into a folder; needs no root.
#   data_prep/fetch_gimp_help.sh data/gimp-help
#   python -m data_prep.build gimp_help --input data/gimp-help --output data/gimp-documents --shard-size 100
#   python -m data_prep.build gimp_help --kind edits --input data/gimp-help --output data/gimp-edits
# Skipped with a line where there is no apt. The pages stay under GFDL: keep them out of the repository.
set -eu
target="${1:?usage: fetch_gimp_help.sh FOLDER}"
if ! command -v apt-get >/dev/null || ! command -v dpkg-deb >/dev/null; then
    echo "skipped: apt-get and dpkg-deb are needed to fetch gimp-help-en" >&2
    exit 0
fi
if [ -e "$target/index.html" ]; then
    echo "$target is there already"
    exit 0
fi
work="$(mktemp -d)"
trap 'rm -rf "$work" "$target.partial.$$"' EXIT
(cd "$work" && apt-get download gimp-help-en)
dpkg-deb -x "$work"/gimp-help-en_*.deb "$work/unpacked"
mkdir -p "$(dirname "$target")"
cp -r "$work"/unpacked/usr/share/gimp/*/help/en "$work/pages"
echo "(c) The GIMP Documentation Team. GNU Free Documentation License 1.2 or later, no invariant sections." \
    >"$work/pages/LICENCE"
partial="$target.partial.$$"
cp -r "$work/pages" "$partial"
mv "$partial" "$target"
echo "$target: $(find "$target" -name '*.html' | wc -l) pages"
