# One fuzz target for each fuzz/fuzz_NAME.c (int LLVMFuzzerTestOneInput(const uint8_t *, size_t)); a comment
# line "/* layer: LAYER */" in it says what it links with; its corpus is data/fuzz/NAME/.
#   fuzz_replay_NAME  always, and as a ctest: the corpus and two seconds of fixed mutations (replay_main.c)
#   fuzz_NAME         with -DSFUMATO_FUZZ=ON and clang: the same with libFuzzer; run it by hand on a copy of
#                     the corpus: build/tests/fuzz_gguf /tmp/corpus tests/data/fuzz/gguf
file(GLOB fuzz_sources CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/fuzz/fuzz_*.c)
foreach(source IN LISTS fuzz_sources)
  get_filename_component(target ${source} NAME_WE)
  string(REPLACE "fuzz_" "" name ${target})
  file(STRINGS ${source} line REGEX "^/\\* layer: [a-z]+ \\*/" LIMIT_COUNT 1)
  string(REGEX REPLACE "^/\\* layer: ([a-z]+) \\*/.*" "\\1" layer "${line}")
  if(NOT line OR NOT TARGET sf_${layer})
    message(WARNING "${source}: left out, needs a line /* layer: NAME */ that names a folder of src")
    continue()
  endif()
  add_executable(fuzz_replay_${name} ${source} fuzz/replay_main.c)
  target_compile_definitions(fuzz_replay_${name} PRIVATE _GNU_SOURCE)
  target_link_libraries(fuzz_replay_${name} PRIVATE sf_${layer})
  add_test(NAME fuzz_replay_${name}
           COMMAND fuzz_replay_${name} ${CMAKE_CURRENT_SOURCE_DIR}/data/fuzz/${name} --seconds 2)
  set_tests_properties(fuzz_replay_${name} PROPERTIES ENVIRONMENT "${test_env}" TIMEOUT 120)
  if(SFUMATO_FUZZ AND NOT TARGET ${target})
    add_executable(${target} ${source})
    target_compile_definitions(${target} PRIVATE _GNU_SOURCE)
    target_link_libraries(${target} PRIVATE sf_${layer})
    target_link_options(${target} PRIVATE -fsanitize=fuzzer)
  endif()
endforeach()
