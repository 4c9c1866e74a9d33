# One call on the card, from the folder that holds what travels; see README.md.
#   bash benchmarks/gpu_day/call.sh parity|pictures|engines|train FOLDER [ARGUMENTS of benchmarks.gpu_day.run]
# What a call unpacks stays in ~/lsast_gpu_day: the packages, what they need in wheels, the pictures in pictures.
set -u
call=$1 folder=$2 place=$HOME/lsast_gpu_day
shift 2
mkdir -p "$place/wheels" "$place/pictures"
[[ -e $folder/code.tar.xz ]] && tar -xJf "$folder/code.tar.xz" -C "$place"
[[ -e $folder/code.tar.xz ]] && tar -xJf "$place/benchmarks/gpu_day/sd15.tar.xz" -C "$place/benchmarks/gpu_day"
for archive in diffusers onnxruntime lite; do
    [[ -e $folder/$archive.tar.xz ]] && tar -xJf "$folder/$archive.tar.xz" -C "$place/wheels"
done
for kind in paintings photos; do
    [[ -e $folder/$kind ]] && cp -r "$folder/$kind" "$place/pictures/"
done
if [[ -e engines/lsast_engines/mini/base.safetensors && ! -L engines/lsast_engines/mini/base.safetensors ]]; then
    cp -r engines/lsast_engines/mini "$place/engines/lsast_engines/"
    find "$place/engines" -type l -delete
fi
[[ $call == pictures ]] && exit
cd "$place" || exit
if [[ $call == parity ]]; then
    # The compiler's work is done while other calls travel; `train` finds it in its cache.
    packages=$place:$(printf "$place/%s:" engines runtime train export eval wheels)
    PYTHONPATH=$packages setsid nohup timeout 400 \
        python3 -m benchmarks.gpu_day.train_steps warm --work "$place/warm" >"$place/warm.log" 2>&1 &
fi
python3 -m benchmarks.gpu_day.run "$call" --out "$OUT" --pictures "$place/pictures" "$@"
tail -c 2000 "$place/warm.log"
cp "$place/warm.log" "$OUT"
