# sfumato_emulated: the whole program with --backend cuda and --comm nccl on a machine without a GPU. The
# kernels run on the fibre emulation, the CUDA runtime and NCCL are stubs (stub/); everything between,
# backend/cuda*.c, comm_{device,nccl,fused,gpu}.c and the engine on them, is the product's own source. Ranks map one
# another's "device memory" by the stub's IPC handles.
if(NOT TARGET sf_kernels_fibre OR NOT TARGET sf_cmd)
  return()
endif()
set(own ${CMAKE_SOURCE_DIR}/src)
file(GLOB cuda_backend CONFIGURE_DEPENDS ${own}/backend/cuda*.c)
set(emulated ${own}/comm/comm.c ${own}/comm/comm_nccl.c ${own}/comm/comm_fused.c
    ${own}/comm/comm_gpu.c ${cuda_backend} stub/cuda_stub.c)
add_executable(sfumato_emulated ${own}/main.c ${own}/cmd/host.c ${own}/base/params.c ${emulated})
add_executable(test_i_run i_run.c ${emulated})
target_link_libraries(test_i_run PRIVATE test_support sf_kernels_fibre sf_engine PkgConfig::CUNIT ${CMAKE_DL_LIBS})
foreach(program sfumato_emulated test_i_run)
  target_compile_definitions(${program} PRIVATE _GNU_SOURCE SFUMATO_WITH_CUDA SFUMATO_WITH_NCCL)
  target_include_directories(${program} BEFORE PRIVATE stub)
  # the stub of NCCL asks the program whether its stream is being captured
  set_target_properties(${program} PROPERTIES LINKER_LANGUAGE CXX ENABLE_EXPORTS ON)
endforeach()
# the archives' own copies of these files are not pulled in: their names are here already
target_link_libraries(sfumato_emulated PRIVATE sf_kernels_fibre sf_cmd ${CMAKE_DL_LIBS})

add_library(nccl_stub SHARED stub/nccl_stub.c)
target_compile_definitions(nccl_stub PRIVATE _GNU_SOURCE)
set_target_properties(nccl_stub PROPERTIES OUTPUT_NAME nccl SOVERSION 2 C_VISIBILITY_PRESET default
                      LIBRARY_OUTPUT_DIRECTORY ${CMAKE_CURRENT_BINARY_DIR}/stub)

# Refuses to start unless CUBLASLT_STUB=on: other tests shall not depend on what is installed here.
add_library(cublaslt_stub SHARED stub/cublaslt_stub.c)
target_compile_definitions(cublaslt_stub PRIVATE _GNU_SOURCE)
set_target_properties(cublaslt_stub PROPERTIES OUTPUT_NAME cublasLt SOVERSION 13 C_VISIBILITY_PRESET default
                      LIBRARY_OUTPUT_DIRECTORY ${CMAKE_CURRENT_BINARY_DIR}/stub)
target_compile_definitions(sfumato_emulated PRIVATE SFUMATO_WITH_CUBLASLT)

# The CUDA backend's products by that library, without the rest of the program.
add_executable(test_emulated_lt emulated_lt.c ${cuda_backend} stub/cuda_stub.c)
target_compile_definitions(test_emulated_lt PRIVATE _GNU_SOURCE SFUMATO_WITH_CUBLASLT)
target_include_directories(test_emulated_lt BEFORE PRIVATE stub ${own})
target_link_libraries(test_emulated_lt PRIVATE test_support sf_kernels_fibre sf_backend sf_base PkgConfig::CUNIT ${CMAKE_DL_LIBS})
set_target_properties(test_emulated_lt PROPERTIES LINKER_LANGUAGE CXX)
add_test(NAME l_emulated_lt COMMAND test_emulated_lt)
set_tests_properties(l_emulated_lt PROPERTIES TIMEOUT 240
  ENVIRONMENT "${test_env};LD_LIBRARY_PATH=${CMAKE_CURRENT_BINARY_DIR}/stub;CUBLASLT_STUB=on")

# The measuring program, at sizes that mean nothing: that it measures to its end.
add_executable(bench_gpu_emulated ${CMAKE_SOURCE_DIR}/bench/gpu.c ${cuda_backend} stub/cuda_stub.c)
target_compile_definitions(bench_gpu_emulated PRIVATE _GNU_SOURCE SFUMATO_WITH_CUBLASLT)
target_include_directories(bench_gpu_emulated BEFORE PRIVATE stub ${own})
target_link_libraries(bench_gpu_emulated PRIVATE sf_kernels_fibre sf_backend sf_base ${CMAKE_DL_LIBS})
set_target_properties(bench_gpu_emulated PROPERTIES LINKER_LANGUAGE CXX)
if(NOT SFUMATO_ASAN)
  add_test(NAME l_emulated_bench_gpu COMMAND bench_gpu_emulated --small --json)
  set_tests_properties(l_emulated_bench_gpu PROPERTIES TIMEOUT 240
    ENVIRONMENT "${test_env};LD_LIBRARY_PATH=${CMAKE_CURRENT_BINARY_DIR}/stub")
endif()

# The ladder's own logic, a few tokens at a time.
if(NOT SFUMATO_ASAN)
  add_test(NAME l_emulated_ladder COMMAND ${CMAKE_SOURCE_DIR}/tests/gpu/ladder ${CMAKE_BINARY_DIR} --emulated
           --minutes 9 --report ${CMAKE_CURRENT_BINARY_DIR}/ladder.json)
  set_tests_properties(l_emulated_ladder PROPERTIES ENVIRONMENT "${test_env}" TIMEOUT 600 PROCESSORS 2)
endif()

# emulated(NAME RANKS ARGUMENTS...): selftest of the emulated program. Slow: a fibre switch per thread and barrier.
function(emulated name ranks)
  add_test(NAME l_emulated_${name}
           COMMAND ${MPIEXEC_EXECUTABLE} ${MPIEXEC_NUMPROC_FLAG} ${ranks} $<TARGET_FILE:sfumato_emulated>
                   selftest --backend cuda --quiet ${ARGN})
  set_tests_properties(l_emulated_${name} PROPERTIES TIMEOUT 600 PROCESSORS 2
    ENVIRONMENT "${test_env};LD_LIBRARY_PATH=${CMAKE_CURRENT_BINARY_DIR}/stub")
endfunction()
# runs(NAME RANKS ARGUMENTS...): runs (engine/run.h) over a toy model.
function(runs name ranks)
  add_test(NAME i_run_${name}
           COMMAND ${MPIEXEC_EXECUTABLE} ${MPIEXEC_NUMPROC_FLAG} ${ranks} $<TARGET_FILE:test_i_run> ${ARGN})
  set_tests_properties(i_run_${name} PROPERTIES TIMEOUT 300 PROCESSORS 2
    ENVIRONMENT "${test_env};LD_LIBRARY_PATH=${CMAKE_CURRENT_BINARY_DIR}/stub")
endfunction()
runs(n1 1)
runs(staged_n2 2)
runs(nccl_n2 2 nccl)
runs(fused_n2 2 fused)
# a rank that draws other numbers ends the job
runs(differ_n2 2)
set_tests_properties(i_run_differ_n2 PROPERTIES PASS_REGULAR_EXPRESSION "row [0-9]+: rank 1 decided otherwise than rank 0")
set_property(TEST i_run_differ_n2 APPEND PROPERTY ENVIRONMENT SFUMATO_FAULT=run-differ:1:2)
# so does one whose records cannot be
runs(impossible_n2 2 nccl)
set_tests_properties(i_run_impossible_n2 PROPERTIES PASS_REGULAR_EXPRESSION
  "row [0-9]+: rank 1 gave an impossible candidate record")
set_property(TEST i_run_impossible_n2 APPEND PROPERTY ENVIRONMENT NCCL_STUB=garbage:1)

if(NOT SFUMATO_ASAN)
  emulated(verbs 1 verbs)
  emulated(verbs_exact 1 verbs --deterministic)
  emulated(comm_staged 2 comm --comm mpi)
  emulated(comm_nccl 2 comm --comm nccl)
  emulated(comm_nccl_tree 3 comm --comm nccl --deterministic)
  emulated(comm_fused 3 comm --comm fused)
  emulated(model_fused 2 model --comm fused --deterministic)
endif()
