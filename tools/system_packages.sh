#!/bin/sh
# FFCV is built from source against OpenCV and libjpeg-turbo, pipelines/images/jpeg_box.c against the latter; tests
# need iproute2 (two machines) and chromium (pages).
set -eu
missing=""
for package in pkg-config libopencv-dev libturbojpeg0-dev libjpeg-dev g++ iproute2 chromium; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing="$missing $package"
done
[ -z "$missing" ] && exit 0
if ! command -v apt-get >/dev/null; then
    echo "FFCV and some tests need (Debian's names):$missing. Install them and run this again." >&2
    exit 2
fi
if [ "$(id -u)" != 0 ]; then
    echo "FFCV and some tests need system packages. Run this, then make again:" >&2
    echo "    sudo apt-get install$missing" >&2
    exit 2
fi
apt-get update -qq
# shellcheck disable=SC2086  # a list of words
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
