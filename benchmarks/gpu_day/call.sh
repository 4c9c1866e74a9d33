# One call on the card, from the folder that holds what travels; see README.md.
#   bash benchmarks/gpu_day/call.sh parity|pictures|engines|train FOLDER [ARGUMENTS of benchmarks.gpu_day.run]
# The packages lie in /tmp/lsast, what they need in its folder wheels, the pictures in /tmp/pictures.
set -u
call=$1 folder=$2
shift 2
mkdir -p /tmp/lsast/wheels /tmp/pictures
[[ -e $folder/code.tar.xz ]] && tar -xJf "$folder/code.tar.xz" -C /tmp/lsast
[[ -e $folder/code.tar.xz ]] && tar -xJf /tmp/lsast/benchmarks/gpu_day/sd15.tar.xz -C /tmp/lsast/benchmarks/gpu_day
for archive in diffusers onnxruntime lite; do
    [[ -e $folder/$archive.tar.xz ]] && tar -xJf "$folder/$archive.tar.xz" -C /tmp/lsast/wheels
done
for kind in paintings photos; do
    [[ -e $folder/$kind ]] && cp -r "$folder/$kind" /tmp/pictures/
done
if [[ -e engines/lsast_engines/mini/base.safetensors && ! -L engines/lsast_engines/mini/base.safetensors ]]; then
    cp -r engines/lsast_engines/mini /tmp/lsast/engines/lsast_engines/
    find /tmp/lsast/engines -type l -delete
fi
[[ $call == pictures ]] && exit
cd /tmp/lsast
if [[ $call == parity ]]; then
    # The compiler's work is done while other calls travel; `train` finds it in its cache.
    packages=/tmp/lsast/engines:/tmp/lsast/runtime:/tmp/lsast/train:/tmp/lsast/export:/tmp/lsast/eval:/tmp/lsast/wheels
    PYTHONPATH=/tmp/lsast:$packages setsid nohup timeout 400 \
        python3 -m benchmarks.gpu_day.train_steps warm --work /tmp/warm >/tmp/warm.log 2>&1 &
fi
python3 -m benchmarks.gpu_day.run "$call" --out "$OUT" --pictures /tmp/pictures "$@"
tail -c 2000 /tmp/warm.log
cp /tmp/warm.log "$OUT"
