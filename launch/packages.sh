# packages.sh: sourced by quickstart and check: installs the Debian packages that are missing, and only
# these. Works as root or with sudo; with neither it says what to install.

# need_packages NAME...
need_packages() {
    local missing=() package
    for package in "$@"; do
        dpkg-query -W -f='${db:Status-Abbrev}' "$package" 2>/dev/null | grep -q '^ii' || missing+=("$package")
    done
    if [ ${#missing[@]} -eq 0 ]; then
        echo "== packages: all there"
        return
    fi
    echo "== packages: installing ${missing[*]}"
    local as_root=()
    if [ "$(id -u)" -ne 0 ]; then
        command -v sudo >/dev/null || { echo "run this as root, or install: ${missing[*]}" >&2; exit 1; }
        as_root=(sudo)
    fi
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get update -q
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "${missing[@]}"
}

build_packages=(build-essential cmake ninja-build pkg-config openmpi-bin libopenmpi-dev libjansson-dev
    libpcre2-dev libutf8proc-dev libhwloc-dev libevent-dev libssl-dev libnghttp2-dev protobuf-c-compiler libprotobuf-c-dev
    python3 python3-jinja2)

# mpirun as root, more ranks than cores, and no core binding: sfumato places its own threads.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_hwloc_base_binding_policy=none
